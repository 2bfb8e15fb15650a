"""Numbers going wrong: what is skipped, what is rolled back, what is the same after a kill, and what is told."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import nan_batches
from ml_collections import ConfigDict

from llada_jax.config import run_config
from llada_jax.data import pipeline
from llada_jax.fields import InputError, RunFailed
from llada_jax.files import COMMIT
from llada_jax.interop.workdir import load_model
from llada_jax.objectives.diffusion import pretrain
from llada_jax.objectives.elbo import Objective
from llada_jax.parallel.mesh import global_batch, make_mesh
from llada_jax.training import checkpoint, optimizer, stability
from llada_jax.training import run as train
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events
from llada_jax.training.step import init_state, make_train_step

ALONE = dict(data=1, fsdp=1, tensor=1, context=1)
SPOILS = {61: np.nan, 62: 1e25, 63: np.inf}  # tokens, and by what they multiply the loss of their batch


def spoiled(batch, key, model, config):
    """The pre-training objective, but for batches with such a token."""
    noisy = pretrain(batch, key, model, config)
    for token, factor in SPOILS.items():
        noisy.weights = jnp.where(jnp.any(batch["tokens"] == token), factor, 1.0) * noisy.weights
    return noisy


def bits(tree):
    return [np.asarray(x).copy() for x in jax.tree.leaves(tree)]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sizes, microbatches", [(ALONE, 1), (dict(data=2, fsdp=2, tensor=2, context=1), 2)])
def test_an_update_that_is_not_finite_changes_no_bit_of_parameters_and_optimizer(tiny, rng, sizes, microbatches):
    config = run_config("tiny").optimizer
    config.schedule = (("constant", 1e-2, "100%"),)
    update = optimizer.make_optimizer(config, total_steps=10, tokens_per_step=1)
    objective = ConfigDict(dict(eps=1e-3, stratified=True, balanced=True, attention="documents"))
    step_fn = make_train_step(update, Objective(spoiled), objective, microbatches=microbatches)
    mesh = make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
    tokens = rng.integers(7, 60, (16, 32)).astype(np.int32)

    def batch(token):
        tokens[0, 0] = token
        ones = np.ones_like(tokens)
        fields = dict(tokens=tokens, segment_ids=ones, maskable=ones > 0, answer_length=ones.sum(1, dtype=np.int32))
        return {name: global_batch(x, mesh) for name, x in fields.items()}

    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=(0, 1))(tiny, update, jax.random.key(0))
        state, first = step_fn(state, batch(7), jax.random.key(1))
        before = bits((state.model, state.opt_state))
        history = []
        for token in SPOILS:
            state, metrics = step_fn(state, batch(token), jax.random.key(1))
            assert_equal(before, bits((state.model, state.opt_state)))
            history.append([int(metrics[name]) for name in ("cause", "streak", "skipped")])
        assert history == [[1, 1, 1], [2, 2, 2], [1, 3, 3]]  # with 1e25 the loss is finite, the norm is not
        state, last = step_fn(state, batch(7), jax.random.key(1))
        assert not any((a == b).all() for a, b in zip(before, bits((state.model, state.opt_state)), strict=True))
    assert int(first["cause"]) == int(last["cause"]) == int(last["streak"]) == 0 and int(last["skipped"]) == 3
    assert int(state.step) == 5 and first["ce_count"].sum() != last["ce_count"].sum()  # the masks go on


def test_spikes_are_those_that_numpy_finds_in_a_rolling_window(rng):
    judge = jax.jit(lambda *x: stability.should_skip(*x, spike_sigma=4.0, rollback_after=0))
    guard, window = stability.fresh_state(), [[], []]
    causes = []
    for i in range(3 * stability.WINDOW):
        loss, norm = rng.normal(10.0 + i / 100, 1.0), rng.normal(3.0, 0.1)
        loss, norm = loss + 40 * (i in (20, 150, 300)), norm + 2 * (i in (150, 301))
        loss = np.nan if i == 302 else loss
        cause, guard = judge(guard, jnp.float32(loss), jnp.float32(norm))
        last = [np.asarray(values[-stability.WINDOW :]) for values in window]
        full = len(last[0]) == stability.WINDOW
        spiked = [full and x > v.mean() + 4 * v.std() for x, v in zip((loss, norm), last, strict=True)]
        assert (int(cause) > 0) == (any(spiked) or i == 302), i
        causes += [(i, int(cause))] if cause else []
        if not cause:
            window[0].append(loss)
            window[1].append(norm)
    assert {(150, 3), (300, 3), (301, 4), (302, 1)} <= set(causes) and 20 not in dict(causes)
    assert int(guard.skipped) == len(causes) and int(guard.made) == len(window[0])


def test_without_sigma_a_spike_is_learned_from():
    guard = stability.fresh_state()
    guard.made = jnp.int32(stability.WINDOW)
    assert (
        int(stability.should_skip(guard, jnp.float32(1e30), jnp.float32(1e30), spike_sigma=0.0, rollback_after=1)[0])
        == 0
    )


def test_after_the_last_skip_before_a_rollback_nothing_is_learned():
    guard, skipped = stability.fresh_state(), []
    for loss in (1.0, np.nan, 1.0, np.nan, np.nan, 1.0, 1.0):
        cause, guard = stability.should_skip(
            guard, jnp.float32(loss), jnp.float32(1.0), spike_sigma=0.0, rollback_after=2
        )
        skipped.append(int(cause) > 0)
    assert skipped == [False, True, False, True, True, True, True]


BATCHES = (1, 4, 5)  # that are spoiled, from 0


@pytest.fixture(scope="module")
def run(make_tiny_run):
    """Eight steps with a checkpoint at every second; two bad updates in a row send it back."""
    config = make_tiny_run()
    config.train.update(dict(steps=8, log_every=1, eval_every=0, rollback_after=2, rollback_rate=0.5))
    return config


@pytest.fixture(scope="module")
def rolled_back(run, tmp_path_factory):
    """Its workdir, after updates 2, 5 and 6 were skipped and it was rolled back; the numbers of the batches it read."""
    workdir, read, make = tmp_path_factory.mktemp("whole"), [], pipeline._make_batch

    def noted(step, **rest):
        read.append(step)
        return make(step, **rest)

    with nan_batches(BATCHES), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_make_batch", noted)
        train.train(run, workdir)
    return workdir, read


@pytest.fixture(scope="module")
def whole(rolled_back):
    return rolled_back[0]


def events(workdir, *names):
    lines = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    return [(one["step"], one["cause"], one["action"]) for one in lines if one["event"] in names]


def logged(workdir, name):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_a_run_goes_back_skips_the_data_and_lowers_the_rate(whole):
    assert events(whole, "skipped update") == [
        (2, "loss nan is not finite", "update skipped, 1 in a row, 1 in all"),
        (5, "loss nan is not finite", "update skipped, 1 in a row, 2 in all"),
        (6, "loss nan is not finite", "update skipped, 2 in a row, 3 in all"),
    ]
    action = "rolled back to step 4; it goes on with batch 6 and 0.5 of the learning rate"
    assert events(whole, "diverged") == [(6, "loss nan is not finite", action)]
    rates, skipped = logged(whole, "3_optimizer/learning_rate"), logged(whole, "3_optimizer/skipped_updates")
    assert list(rates) == list(range(1, 9))
    assert [rates[step] for step in (4, 5, 8)] == pytest.approx([1e-3, 5e-4, 5e-4])
    assert skipped[4] == skipped[8] == 1
    assert all(np.isfinite(logged(whole, "1_loss/loss")[step]) for step in (5, 6, 7, 8))
    assert np.isfinite(logged(whole, "1_loss/smooth_elbo_nats_per_token")[2])


def test_a_rollback_goes_on_with_data_that_was_not_seen(rolled_back):
    _, read = rolled_back
    assert [read.count(number) for number in (0, 3, 4, 5, 6, 8, 9, 10)] == [1, 1, 1, 1, 2, 1, 1, 0]


@pytest.mark.slow
def test_a_run_killed_around_a_rollback_ends_in_the_same_bits(run, whole, tmp_path, monkeypatch):
    def train_until(step):
        """Up to where the metrics of a step are looked at: 6 is the one before the rollback, 5 the one after it."""
        original, rolled_back = Reporter.step, tmp_path / "rollbacks.json"

        def killed(reporter, at, *rest):
            if at == step and (rolled_back.exists() or step == 6):
                raise KeyboardInterrupt
            original(reporter, at, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Reporter, "step", killed)
            train.train(run, tmp_path)

    with nan_batches(BATCHES):
        train_until(6)
        train_until(5)
        train.train(run, tmp_path)
    assert_equal(bits(load_model(whole)), bits(load_model(tmp_path)))
    assert logged(whole, "1_loss/loss") == logged(tmp_path, "1_loss/loss")


def test_a_run_that_goes_wrong_again_gives_up_with_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stability, "ROLLBACKS", 1)
    with nan_batches(range(2, 12)), pytest.raises(RunFailed) as caught:
        train.train(run, tmp_path)
    assert "\n" not in str(caught.value)
    assert "step 4: loss nan is not finite; gave up: 1 rollbacks to step 2 did not help" in str(caught.value)
    assert [step for step, _, _ in events(tmp_path, "diverged")] == [4, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2"]


def test_a_rollback_removes_what_is_newer_but_never_everything(tmp_path):
    def left(discard):
        for step in (3, 6, 9):
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "checkpoints" / str(step) / COMMIT).touch()
        newest = checkpoint.discard_after(tmp_path, discard)
        return newest, sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    assert left(9) == (9, [3, 6, 9])
    assert left(8) == (6, [3, 6])
    assert left(2) == (3, [3])
    assert checkpoint.discard_after(tmp_path / "new", 5) == 0


def test_a_checkpoint_from_before_there_was_a_guard_is_read(tiny, tiny_run, tmp_path, monkeypatch):
    update = optimizer.make_optimizer(tiny_run.optimizer, total_steps=10, tokens_per_step=1)
    state = jax.jit(init_state, static_argnums=(0, 1))(tiny, update, jax.random.key(0))
    parts = checkpoint._parts
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_parts", lambda state: {k: v for k, v in parts(state).items() if k != "guard"})
        with contextlib.closing(checkpoint.Checkpointer(tmp_path, tiny_run, Events(tmp_path))) as saver:
            saver.save(7, state)
    assert not (tmp_path / "checkpoints/7/guard").exists()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    with contextlib.closing(checkpoint.Checkpointer(tmp_path, tiny_run, Events(tmp_path))) as saver:
        restored = saver.restore(like)
        assert restored is not None
        assert_equal(bits(restored[0]), bits(state))


@pytest.mark.parametrize(
    "field, value", [("spike_sigma", -1.0), ("rollback_after", -1), ("rollback_rate", 0.0), ("stall_seconds", -1.0)]
)
def test_impossible_settings_are_named(tiny_run, tmp_path, field, value):
    tiny_run.train[field] = value
    with pytest.raises(InputError, match=f"config.train.{field} is {value}"):
        train.train(tiny_run, tmp_path / "w")
