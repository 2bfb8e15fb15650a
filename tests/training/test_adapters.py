"""Runs that train adapters of a frozen base."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.config import Lora, run_config
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.workdir import named_leaves
from llada_jax.model import lora
from llada_jax.model.transformer import Transformer
from llada_jax.objectives import OBJECTIVES
from llada_jax.tools import convert_checkpoint
from llada_jax.training import optimizer
from llada_jax.training import run as train
from llada_jax.training.step import adapted_state, make_train_step


@pytest.fixture(scope="module")
def make_adapters(make_run, trained):
    """Makes configs of runs that train adapters of the model of another run."""

    def make(steps=4, **fields):
        run = make_run(steps=steps, init_from=str(trained), microbatches=1)
        run.mesh.update(dict(data=2, fsdp=2, tensor=2))
        run.lora.update(dict(rank=2, alpha=4.0, dropout=0.2, targets=("q_proj", "ff_out", "wte")) | fields)
        return run

    return make


@pytest.fixture(scope="module", params=["float32", "int8"])
def adapted(request, make_adapters, tmp_path_factory):
    """A run of four steps on a 2x2x2 mesh, with checkpoints 2 and 4, and how it holds its base."""
    workdir = tmp_path_factory.mktemp(request.param) / "w"
    train.train(make_adapters(base=request.param), workdir)
    return workdir, request.param


def test_a_run_changes_its_adapters_alone_and_comes_back_with_them(adapted, trained):
    workdir, base = adapted
    quantize = "int8" if base == "int8" else None
    model, plain = hf.load(workdir, quantize=quantize), hf.load(trained, quantize=quantize)
    found, wanted = dict(named_leaves(model)), dict(named_leaves(plain))
    for name, x in wanted.items():
        np.testing.assert_array_equal(np.asarray(found.pop(name)), np.asarray(x), err_msg=name)
    assert {name.rpartition(".")[0] for name in found} == {"lora", "blocks.lora.q_proj", "blocks.lora.ff_out"}
    assert np.asarray(model.blocks.lora["q_proj"].B[...]).any() and np.asarray(model.lora.A[...]).any()


def test_a_run_logs_how_large_its_adapters_are_beside_the_weights(adapted):
    workdir, base = adapted
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    model = hf.load(workdir, quantize="int8" if base == "int8" else None)
    last = [lines[-1][f"3_optimizer/adapter_{name}_over_weight"] for name in ("mean", "max")]
    np.testing.assert_allclose(last, jax.jit(lora.relative_size)(model), rtol=1e-3)
    assert 0 < last[0] < last[1]


def test_checkpoints_hold_adapters_alone_and_name_their_base(adapted, trained):
    workdir, _ = adapted
    size = lambda place: sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    names = (workdir / "checkpoints" / "4" / "model" / "_METADATA").read_text()
    assert "lora" in names and "attn_norm" not in names
    assert size(workdir / "checkpoints" / "4") < 0.7 * size(trained / "checkpoints" / "6")
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["init_from"] == str(trained) and len(config["lora"]["fingerprint"]) == 64


def test_a_run_that_stopped_ends_in_the_same_bits(adapted, make_adapters, tmp_path):
    workdir, base = adapted
    copy = shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(copy / "checkpoints" / "4")
    train.train(make_adapters(base=base), copy)
    for (name, x), (_, y) in zip(named_leaves(hf.load(workdir)), named_leaves(hf.load(copy)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def test_adapters_do_not_go_on_with_another_base(adapted, make_adapters, trained, tmp_path):
    workdir, base = adapted
    other, copy = shutil.copytree(trained, tmp_path / "other"), shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(other / "checkpoints" / "6")
    run = make_adapters(steps=6, base=base)
    run.train.init_from = str(other)
    with pytest.raises(InputError, match="config.lora.fingerprint"):
        train.train(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["train"]["init_from"] = str(other)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trained on another model"):
        hf.load(copy)
    shutil.rmtree(other)
    with pytest.raises(InputError, match="which is not there"):
        hf.load(copy)


@pytest.mark.slow
def test_a_run_becomes_a_plain_checkpoint_and_an_adapter_of_peft(adapted, trained, tmp_path):
    workdir, _ = adapted
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    wanted = np.asarray(hf.load(workdir)(ids))
    close = lambda model: np.testing.assert_allclose(model(ids), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    convert = convert_checkpoint.convert
    with pytest.raises(InputError, match="--merge"):
        convert(workdir, tmp_path / "plain", "hf", None, "5GB", False)
    said = convert(workdir, tmp_path / "plain", "hf", None, "5GB", True, merge=True)
    assert "merging moved weights" in said and "PyTorch computes the same" in said
    close(hf.load(tmp_path / "plain"))
    convert(workdir, tmp_path / "adapter", "peft", None, "5GB", False)
    close(hf.load(trained, adapter=tmp_path / "adapter"))
    convert(trained, tmp_path / "again", "hf", None, "5GB", True, adapter=[tmp_path / "adapter"], merge=True)
    close(hf.load(tmp_path / "again"))


def test_adapters_of_nothing_or_of_no_weight_are_refused(make_adapters, tmp_path):
    run = make_adapters()
    run.train.init_from = ""
    with pytest.raises(InputError, match="init_from"):
        train.train(run, tmp_path / "w")
    with pytest.raises(InputError, match="o_proj"):
        train.train(make_adapters(targets=("o_proj",)), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_dropout_is_drawn_anew_in_every_step_and_microbatch(tiny):
    """Same batch, same masks: only dropout can tell two steps, or two microbatches of equal rows, apart."""
    settings = run_config("tiny").optimizer
    settings.schedule = (("constant", 0.0, "100%"),)
    update = optimizer.make_optimizer(settings, total_steps=10, tokens_per_step=1)

    def norms(dropout, microbatches):
        base = Transformer(tiny, jax.random.key(0))
        made = adapted_state(base, Lora(rank=2, dropout=dropout), update, jax.random.key(1))
        B = jax.tree.map(lambda x: x, made.trainable)
        for a in lora.adapters_of(B).values():
            a.B[...] = jnp.ones_like(a.B[...]) / 10
        made.trainable = B
        step = make_train_step(update, objective, None, microbatches=microbatches)
        rows = jnp.tile(jnp.arange(16, dtype=jnp.int32)[None] % 50 + 7, (4, 1))
        batch = dict(tokens=rows, segment_ids=jnp.ones_like(rows), maskable=rows > 0, answer_length=jnp.full(4, 16))
        found = []
        for _ in range(2):
            made, metrics = step(made, batch, jax.random.key(2))
            found.append(float(metrics["loss"]))
        return found

    pretrain = OBJECTIVES["pretrain"]
    fixed = lambda batch, key, c, config: pretrain.corrupt(batch, jax.random.key(5), c, run_config().objective)
    objective = type(pretrain)(fixed)
    without, halves = norms(0.0, 1), norms(0.5, 1)
    assert without[0] == without[1] and halves[0] != halves[1]
    assert norms(0.5, 2)[0] != halves[0] and norms(0.0, 2)[0] == pytest.approx(without[0], rel=1e-5)
