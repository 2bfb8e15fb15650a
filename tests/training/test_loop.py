"""What a run does besides its steps: evaluation, samples, profiles, and what it says of its speed."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llada_jax.data.dataset import open_dataset
from llada_jax.data.pipeline import ordered
from llada_jax.fields import InputError
from llada_jax.interop.workdir import load_config, load_model
from llada_jax.model.config import model_config
from llada_jax.parallel.mesh import make_mesh
from llada_jax.tools import kill_test
from llada_jax.training import loop, metrics, step
from llada_jax.training import run as train


def lines(workdir, name):
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in logged if name in line}


class Rows:
    """A validation set of so many rows: the first ones of a real one, again and again."""

    def __init__(self, source, count):
        self._source, self._count = source, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self._source[index % len(self._source)]

    def __getattr__(self, name):
        return getattr(self._source, name)


@pytest.mark.parametrize(
    "eval_rows, held, batch, microbatches, rows, sizes",
    [
        (8, 40, 32, 1, 8, {8}),  # fewer than a batch
        (32, 40, 16, 1, 32, {16}),
        (20, 40, 16, 1, 20, {16}),  # no multiple of the batch
        (64, 40, 16, 1, 40, {16}),  # no more than there are
        (16, 3, 16, 1, 16, {16}),  # too few are repeated
        (32, 40, 32, 8, 32, {8}),  # a large one in parts
    ],
)
def test_so_many_rows_are_evaluated_in_parts_that_fit(
    workdir, make_run, monkeypatch, eval_rows, held, batch, microbatches, rows, sizes
):
    run = make_run(eval_rows=eval_rows, batch_size=batch, microbatches=microbatches)
    mesh = make_mesh(dict(data=1, fsdp=4, tensor=1, context=1), jax.devices()[:4])
    seen, original = set(), step.weighted_loss

    def noted(model, noisy):
        seen.add(len(noisy.inputs))
        return original(model, noisy)

    monkeypatch.setattr(step, "weighted_loss", noted)
    tokenizer = train.load_tokenizer(workdir / "tokenizer")
    with jax.set_mesh(mesh):
        model = load_model(workdir, mesh)
        source = Rows(open_dataset(workdir / "data" / "validation"), held)
        found = loop.evaluator(run, source, tokenizer, mesh, None)(model)
    assert seen == sizes
    lengths = np.resize(open_dataset(workdir / "data" / "validation").lengths, held)
    order = ordered([source], seed=0)
    assert found["tokens"] == sum(lengths[order.place(position)[1]] for position in range(rows))


def test_an_evaluation_in_parts_is_that_of_the_whole(workdir, make_run):
    found = []
    for microbatches in (1, 4):
        run = make_run(eval_rows=16, batch_size=16, microbatches=microbatches)
        mesh = make_mesh(dict(data=1, fsdp=2, tensor=1, context=1), jax.devices()[:2])
        tokenizer = train.load_tokenizer(workdir / "tokenizer")
        with jax.set_mesh(mesh):
            model = load_model(workdir, mesh)
            source = open_dataset(workdir / "data" / "validation")
            found.append(loop.evaluator(run, source, tokenizer, mesh, None)(model))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5)


def test_a_validation_that_is_not_finite_is_said_and_is_an_event(make_run, tmp_path, monkeypatch, capsys, events):
    evaluator = train.evaluator

    def spoiled(*arguments):
        evaluate = evaluator(*arguments)
        return lambda model: evaluate(jax.tree.map(lambda x: x * np.nan, model))

    monkeypatch.setattr(train, "evaluator", spoiled)
    train.train(make_run(steps=2, eval_every=2), tmp_path / "w")
    (event,) = events(tmp_path / "w", "not finite")
    assert event["cause"] == "the validation loss of step 2 is not finite"
    assert capsys.readouterr().err.count("is not finite: parameters or activations have overflowed") == 1
    assert lines(tmp_path / "w", "0_validation/elbo_nats_per_token") == {2: None}


def test_the_control_samples_left_to_right_and_its_loss_is_no_elbo(make_run, tmp_path, monkeypatch, capsys):
    asked = []

    def continue_text(model, tokenizer, prompts, most):
        asked.append((prompts, most))
        return ["疑是地上霜。"]

    monkeypatch.setattr(loop.reversal, "continue_text", continue_text)
    run = make_run(steps=2, eval_every=2, sample_every=2, sample_prompt="床前明月光，")
    run.objective.name, run.model.causal = "autoregressive", True
    last = train.train(run, tmp_path / "w")
    assert asked == [(["床前明月光，"], 32)]
    assert "sample: 床前明月光，疑是地上霜。" in capsys.readouterr().err
    assert "0_validation/ce_nats_per_token" in last
    text = (tmp_path / "w" / "metrics.jsonl").read_text()
    assert "elbo" not in text and "1_loss/smooth_ce_nats_per_token" in text


@pytest.mark.slow
def test_dialogues_sample_a_reply_under_the_chat_template(make_run, trained, tmp_path, monkeypatch, capsys):
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "床前明月光？"}, {"role": "assistant", "content": "疑是地上霜"}]
    chat.write_text("\n".join([json.dumps({"messages": messages}, ensure_ascii=False)] * 8))
    run = make_run(steps=1, sample_every=1, sample_prompt="床前明月光？", init_from=str(trained))
    run.data.update(dict(kind="chat", files=str(chat), row_length=40, validation_fraction=0.0))
    run.objective.name = "sft"
    asked, generate = [], loop.prompts.generate

    def noted(model, ids, **options):
        asked.append(np.asarray(ids)[0].tolist())
        return generate(model, ids, **options)

    monkeypatch.setattr(loop.prompts, "generate", noted)
    train.train(run, tmp_path / "w")
    tokenizer = train.load_tokenizer(trained / "tokenizer")
    assert asked == [tokenizer.encode_chat(messages[:1])]
    (shown,) = [line for line in capsys.readouterr().err.splitlines() if "sample: " in line]
    assert "床前明月光？" not in shown  # the reply alone


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(2, 3), (3, 100)])
def test_profiled_steps_are_there_for_tensorboard_and_xprof(tmp_path, steps):
    """In a process of its own: where libtpu was loaded for absent TPUs, as tests do, JAX's profiler crashes."""
    command = [sys.executable, "-m", "llada_jax.train", *kill_test.RUN, f"--workdir={tmp_path / 'w'}"]
    fields = ("steps=4", "eval_every=0", f"profile_steps={steps}")
    environment = os.environ | {"XLA_FLAGS": kill_test.QUICK}
    done = subprocess.run(
        [*command, *(f"--config.train.{field}" for field in fields)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (place,) = (tmp_path / "w" / "plugins" / "profile").iterdir()
    (trace,) = place.glob("*.xplane.pb")
    found = trace.read_bytes()
    assert b"train_step" in found or b"jit_train_step" in found
    assert not (tmp_path / "w" / "checkpoints" / "plugins").exists()


@pytest.mark.parametrize("steps", [(1,), (3, 2), (0, 2), ("1", 2), (1.0, 2)])
def test_steps_that_cannot_be_profiled_are_named(make_run, tmp_path, steps):
    with pytest.raises(InputError, match="config.train.profile_steps is .*; it must be .first, last."):
        train.train(make_run(profile_steps=steps), tmp_path / "w")


@pytest.fixture
def seconds(monkeypatch):
    """A clock in the place of the module `time` of the reports, which a test sets."""

    class Seconds:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Seconds()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_seconds_per_step_count_no_compilation_and_no_evaluation(workdir, seconds, capsys):
    c = model_config(load_config(workdir)["model"])
    report = metrics.Reporter(
        workdir, c, rows=8, length=24, tokens_per_byte=1.0, schedule=lambda step: np.float32(0), total_steps=9,
        first_step=6, log_every=3, title="train", notes={}, goodput=metrics.Goodput(workdir, time.time()),
        events=metrics.Events(workdir),
    )  # fmt: skip
    numbers = dict(loss=1.0, grad_norm=1.0, tokens=100.0, elbo_sum=1.0, skipped=0, rate=1.0)
    numbers |= dict(ce_sum=np.ones(10), ce_count=np.ones(10))
    seconds.now += 500  # compiling
    report.step(7, numbers, 0.0)
    seconds.now += 2
    report.step(8, numbers, 0.0)
    with report.not_counted():
        seconds.now += 100  # an evaluation
    seconds.now += 2
    report.step(9, numbers, 0.0)
    report.close()
    assert lines(workdir, "4_speed/seconds_per_step")[9] == 2.0
    assert lines(workdir, "4_speed/tokens_per_second")[9] == 50.0
    assert "0:00 left" in capsys.readouterr().err
