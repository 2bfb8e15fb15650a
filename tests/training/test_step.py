"""One step is the same step on every mesh and for every number of microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.model.masks import Mask
from llada_jax.model.transformer import Transformer
from llada_jax.objectives import OBJECTIVES
from llada_jax.objectives.elbo import NoisyBatch
from llada_jax.objectives.noise import mask_ratios
from llada_jax.parallel.mesh import global_batch, make_mesh
from llada_jax.training import optimizer, step
from llada_jax.training.step import init_state, make_eval_step, make_train_step

OBJECTIVE = ConfigDict(dict(eps=1e-3, stratified=True, balanced=True, attention="documents"))


def run(tiny, rng, *, sizes=None, microbatches=1, objective="pretrain", steps=3):
    tokens = rng.integers(7, 60, (16, 32)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 20:], segments[::3, 25:] = 2, 0
    fields = tokens, segments, (segments > 0) & (np.arange(32) > 2), (segments > 0).sum(1).astype(np.int32)
    config = run_config("tiny").optimizer
    config.schedule = (("constant", 1e-2, "100%"),)
    update = optimizer.make_optimizer(config, total_steps=10, tokens_per_step=1)
    step_fn = make_train_step(update, OBJECTIVES[objective], OBJECTIVE, microbatches=microbatches)
    mesh = make_mesh(sizes or dict(data=1, fsdp=1, tensor=1, context=1), None if sizes else jax.devices()[:1])
    with jax.set_mesh(mesh):
        init = jax.jit(init_state, static_argnums=(0, 1))
        state = init(tiny, update, jax.random.key(0))
        batch = dict(
            zip(
                ("tokens", "segment_ids", "maskable", "answer_length"),
                (global_batch(x, mesh) for x in fields),
                strict=True,
            )
        )
        history = []
        for _ in range(steps):
            state, metrics = step_fn(state, batch, jax.random.key(1))
            history.append(metrics)
    return state, [jax.tree.map(np.asarray, m) for m in history]


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5, atol=1e-6, err_msg=name)


@functools.cache
def alone(tiny, objective):
    return run(tiny, np.random.default_rng(0), objective=objective)[1]


@pytest.mark.parametrize(
    "objective, sizes, microbatches",
    [
        ("pretrain", None, 4),
        ("pretrain", dict(data=1, fsdp=-1, tensor=1, context=1), 2),
        ("pretrain", dict(data=2, fsdp=2, tensor=2, context=1), 1),
        ("sft", dict(data=1, fsdp=2, tensor=2, context=2), 2),
        ("autoregressive", dict(data=2, fsdp=1, tensor=2, context=2), 1),
    ],
)
def test_mesh_and_accumulation_change_nothing(tiny, objective, sizes, microbatches):
    tiny = dataclasses.replace(tiny, causal=objective == "autoregressive")
    _, other = run(tiny, np.random.default_rng(0), objective=objective, sizes=sizes, microbatches=microbatches)
    assert_same(alone(tiny, objective), other)


def test_state_is_born_sharded(tiny):
    state, _ = run(tiny, np.random.default_rng(0), sizes=dict(data=1, fsdp=4, tensor=2, context=1), steps=1)
    matrices = [x for x in jax.tree.leaves((state.model, state.opt_state)) if x.ndim > 2]
    assert len(matrices) == 3 * 7
    for x in matrices:
        assert x.addressable_shards[0].data.size == x.size // 8, x.sharding


def test_each_device_takes_its_rows_in_the_order_of_their_mask_ratios(rng):
    ratio = rng.random(16).astype(np.float32)
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=1, context=2))
    with jax.set_mesh(mesh):
        ids_BL = global_batch(np.repeat(np.arange(16)[:, None], 4, axis=1), mesh)
        noisy = NoisyBatch(ids_BL, ids_BL, ids_BL, jnp.asarray(ratio), Mask(segment_ids=ids_BL))
        found = jax.jit(step._by_ratio)(noisy)
    wanted = np.concatenate([rows[np.argsort(ratio[rows])] for rows in np.arange(16).reshape(4, 4)])
    np.testing.assert_array_equal(found.ratio, ratio[wanted])
    for x in (found.inputs, found.targets, found.weights, found.mask.segment_ids):
        np.testing.assert_array_equal(np.asarray(x)[:, 0], wanted)


def test_a_microbatch_has_rows_of_the_same_rank_of_every_device(tiny, rng, monkeypatch):
    ratio, weighted_loss, pretrain = rng.random(16).astype(np.float32), step.weighted_loss, OBJECTIVES["pretrain"]

    def with_sum(model, noisy):
        loss, sums = weighted_loss(model, noisy)
        return loss, sums | {"square": jnp.sum(noisy.ratio) ** 2}

    corrupt = lambda *arguments: dataclasses.replace(pretrain.corrupt(*arguments), ratio=jnp.asarray(ratio))
    monkeypatch.setattr(step, "weighted_loss", with_sum)
    monkeypatch.setitem(OBJECTIVES, "pretrain", dataclasses.replace(pretrain, corrupt=corrupt))
    _, (metrics,) = run(tiny, rng, sizes=dict(data=1, fsdp=8, tensor=1, context=1), microbatches=2, steps=1)
    lower, upper = np.sort(ratio.reshape(8, 2), axis=1).sum(axis=0)
    assert metrics["square"] == pytest.approx(lower**2 + upper**2, rel=1e-5)


def test_validation_rows_have_the_same_masks_whatever_fills_up_their_batch(tiny, rng):
    tokens = jnp.asarray(rng.integers(7, 60, (16, 32)))
    evaluate = make_eval_step(OBJECTIVES["pretrain"], ConfigDict({**OBJECTIVE, "stratified": False}))

    def found(rows):
        maskable = jnp.broadcast_to(jnp.arange(rows)[:, None] < 8, (rows, 32))
        batch = dict(tokens=tokens[:rows], segment_ids=jnp.ones((rows, 32), int), maskable=maskable)
        return evaluate(Transformer(tiny, jax.random.key(0)), batch, jax.random.key(1))

    assert_same([found(8)], [found(16)])


def test_training_rows_are_dealt_for_balance(tiny):
    tokens = jnp.full((60, 32), 7)
    batch = dict(tokens=tokens, segment_ids=tokens, maskable=tokens > 0, answer_length=jnp.full(60, 32))
    ratios_key, _ = jax.random.split(jax.random.key(1))
    for balanced in (True, False):
        config = {**OBJECTIVE, "balanced": balanced}
        wanted = mask_ratios(ratios_key, 60, stratified=True, balanced=balanced)
        for name in ("pretrain", "sft"):
            noisy = OBJECTIVES[name].corrupt(batch, jax.random.key(1), tiny, ConfigDict(config))
            np.testing.assert_array_equal(noisy.ratio, wanted)


def test_each_step_draws_new_masks(tiny):
    _, history = run(tiny, np.random.default_rng(0))
    assert len({tuple(m["ce_count"].tolist()) for m in history}) == 3


def test_it_learns(tiny):
    tiny = dataclasses.replace(tiny, causal=True)
    _, history = run(tiny, np.random.default_rng(0), steps=40, objective="autoregressive")
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3, fsdp=1, tensor=1, context=1), "data=3 fsdp=1 tensor=1 context=1 does not fit 8 devices"),
        (dict(data=-1, fsdp=-1, tensor=1, context=1), "at most one may be -1"),
        (dict(data=1, fsdp=-1, tensor=3, context=1), "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(sizes)


def test_donated_state_is_not_kept(tiny):
    update = optimizer.make_optimizer(run_config("tiny").optimizer, total_steps=10, tokens_per_step=1)
    state = jax.jit(init_state, static_argnums=(0, 1))(tiny, update, jax.random.key(0))
    ones = jnp.ones((2, 8), jnp.int32)
    batch = dict(tokens=ones * 9, segment_ids=ones, maskable=ones > 0, answer_length=ones[:, 0] * 8)
    step_fn = make_train_step(update, OBJECTIVES["pretrain"], OBJECTIVE)
    step_fn(state, batch, jax.random.key(0))
    assert state.model.wte[...].is_deleted()
