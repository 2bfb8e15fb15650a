"""The whole line on real text: train, continue, fine-tune, sample; and what users get wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from reference import REFERENCE

from llada_jax import sample
from llada_jax.data import sources
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config, load_model
from llada_jax.parallel.mesh import make_mesh
from llada_jax.training import loop
from llada_jax.training import run as train
from llada_jax.training.monitor import Events

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def couplets_file(tmp_path):
    path = tmp_path / "poems.jsonl"
    lines = [
        json.dumps({"text": sources.couplet_text(a, b)}, ensure_ascii=False) for a, b, _ in sources.couplets()[:60]
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def run(tiny_run, couplets_file):
    tiny_run.data.files = str(couplets_file)
    return tiny_run


def metrics(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(model)]


def test_a_run_leaves_everything_that_is_needed_to_use_it(run, tmp_path):
    run.train.sample_every, run.train.sample_prompt = 4, "床前明月光，"
    last = train.train(run, tmp_path / "w")
    assert 0 < last["0_validation/elbo_nats_per_token"] < 20  # 8 rows, some of small p
    workdir = tmp_path / "w"
    stored = load_config(workdir)
    assert stored["model"]["vocab_size"] == load_tokenizer(workdir / "tokenizer").vocab_size
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    names = {name for line in metrics(workdir) for name in line}
    assert {"1_loss/smooth_elbo_nats_per_token", "1_loss/elbo_bits_per_byte", "4_speed/data_wait_share"} <= names
    assert list(workdir.glob("events.out.tfevents.*"))
    bits, nats = metrics(workdir)[0]["1_loss/elbo_bits_per_token"], metrics(workdir)[0]["1_loss/elbo_nats_per_token"]
    assert bits == pytest.approx(nats / np.log(2))


def test_continuing_gives_the_same_bits_as_one_run(run, tmp_path):
    half = run.copy_and_resolve_references()
    half.train.steps = 2
    half.optimizer.schedule = run.optimizer.schedule = (("constant", 1e-3, "100%"),)
    train.train(run, tmp_path / "once")
    train.train(half, tmp_path / "twice")
    train.train(run, tmp_path / "twice")
    for a, b in zip(*(leaves(load_model(tmp_path / d)) for d in ("once", "twice")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_goes_between_host_and_device_unasked_in_the_loop(run, tmp_path, monkeypatch):
    unguarded = loop.Loop.run

    def guarded(*arguments):
        with jax.transfer_guard("disallow"):
            return unguarded(*arguments)

    monkeypatch.setattr(loop.Loop, "run", guarded)
    run.train.log_every, run.train.eval_every = 1, 0
    train.train(run, tmp_path / "w")
    assert [line["step"] for line in metrics(tmp_path / "w") if "1_loss/loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=2, tensor=2, context=1), dict(data=1, fsdp=1, tensor=1, context=8)]
)
def test_a_checkpoint_is_read_on_any_mesh(run, tmp_path, sizes):
    train.train(run, tmp_path / "w")
    alone = leaves(load_model(tmp_path / "w"))
    mesh = make_mesh(sizes)
    for a, b in zip(alone, leaves(load_model(tmp_path / "w", mesh)), strict=True):
        np.testing.assert_array_equal(a, b)
    run.mesh.update(sizes)
    run.train.steps = 6
    train.train(run, tmp_path / "w")
    assert metrics(tmp_path / "w")[-1]["step"] >= 5


def test_fine_tuning_starts_from_the_model_and_its_tokenizer(run, tmp_path):
    train.train(run, tmp_path / "w")
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "床前明月光？"}, {"role": "assistant", "content": "疑是地上霜"}]
    chat.write_text("\n".join([json.dumps({"messages": messages}, ensure_ascii=False)] * 8))
    run.data.update(dict(kind="chat", files=str(chat), row_length=40, validation_fraction=0.0))
    run.objective.name, run.train.init_from = "sft", str(tmp_path / "w")
    train.train(run, tmp_path / "sft")
    assert (
        load_tokenizer(tmp_path / "w/tokenizer").fingerprint == load_tokenizer(tmp_path / "sft/tokenizer").fingerprint
    )
    before, after = (leaves(load_model(tmp_path / d)) for d in ("w", "sft"))
    moved = np.mean([np.abs(a - b).mean() / np.abs(a).mean() for a, b in zip(before, after, strict=True)])
    assert 0 < moved < 0.2


@pytest.mark.slow
def test_a_published_checkpoint_is_started_from_as_its_workdir_is(run, tmp_path):
    run.train.steps = 1
    train.train(run, tmp_path / "w")
    hf.save_hf(hf.load(tmp_path / "w"), tmp_path / "published", source_dir=tmp_path / "w")
    (tmp_path / "published" / "generation_config.json").write_text("{}")
    run.model.update(dict(n_layers=3, rope_theta=7.0))  # given up for the architecture of the model
    for source in ("w", "published"):
        run.train.init_from = str(tmp_path / source)
        train.train(run, tmp_path / f"from_{source}")
    after = [leaves(load_model(tmp_path / f"from_{source}")) for source in ("w", "published")]
    assert all((a == b).all() for a, b in zip(*after, strict=True))
    assert (tmp_path / "from_published" / "tokenizer" / "generation_config.json").exists()
    run.data.row_length = 65
    with pytest.raises(InputError, match="row_length 65 is longer than the model's context"):
        train.train(run, tmp_path / "x")


def test_the_step_of_a_damaged_row_is_that_of_its_batch_whatever_rollbacks_left_out(run, tmp_path, events, capsys):
    run.data.on_damage, run.train.batch_size = "skip", 8
    report = train._on_damage(run, Events(tmp_path), offset=3)
    assert report is not None
    report(5 * 8 + 7, "row 1 cannot be read", "row 2 stands in")  # of batch 5, which is that of step 3
    assert [(event["step"], event["cause"]) for event in events(tmp_path)] == [(3, "row 1 cannot be read")]
    assert "row 2 stands in" in capsys.readouterr().err


def change(**fields):
    def apply(run):
        for name, value in fields.items():
            group, field = name.split("__")
            run[group][field] = value

    return apply


@pytest.mark.parametrize(
    "apply, message",
    [
        (change(train__batch_size=12), "config.train.batch_size 12 does not split"),
        (change(train__steps=0), "config.train.steps is 0"),
        (change(objective__name="mlm"), "config.objective.name 'mlm'"),
        (change(objective__name="sft"), "'sft' needs config.data.kind 'chat'"),
        (change(objective__attention="full"), "sees padding"),
        (change(data__split_fraction=0.3), "needs config.objective.attention 'documents'"),
        (change(data__files="nothing/*.txt"), "no such file"),
        (change(data__row_length=65), "row_length 65 is longer than the model's context"),
        (change(model__embedding_size=64, model__vocab_size=64), "has no row for each of the tokenizer's"),
        (change(mesh__tensor=3), "does not fit 8 devices"),
        (change(data__tokenizer="nowhere.model"), "nowhere.model"),
        (change(data__path="nowhere"), "no dataset there"),
        (change(train__init_from="nowhere"), "nowhere"),
        (change(optimizer__schedule=(("linear", 1.0, "soon"),)), "can't read 'soon'"),
    ],
)
def test_mistakes_are_named_before_any_training(run, tmp_path, apply, message):
    apply(run)
    with pytest.raises(InputError, match=message) as caught:
        train.train(run, tmp_path / "w")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_a_workdir_of_another_run_is_refused_with_the_difference(run, tmp_path):
    train.train(run, tmp_path / "w")
    run.optimizer.b2 = 0.99
    with pytest.raises(InputError, match=r"config\.optimizer\.b2: 0\.95 -> 0\.99"):
        train.train(run, tmp_path / "w")


def test_a_workdir_from_before_a_field_existed_is_continued_if_the_field_has_its_default(run, tmp_path):
    train.train(run, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    del old["model"]["family"], old["data"]["threads"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    train.train(run, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(old))
    run.model.family = "illada"
    with pytest.raises(InputError, match=r"config\.model\.family: 'llada' -> 'illada'"):
        train.train(run, tmp_path)


def test_a_tokenizer_that_does_not_match_the_model_is_refused(run, tmp_path, couplets_file):
    train.train(run, tmp_path / "w")
    other = tmp_path / "other.txt"
    other.write_text("words of another language " * 40)
    run.data.files, run.data.validation_fraction = str(other), 0.0
    run.train.steps = 1
    train.train(run, tmp_path / "v")
    hf.save_hf(hf.load(tmp_path / "w"), tmp_path / "published", source_dir=tmp_path / "w")
    (tmp_path / "published" / "generation_config.json").write_text("{}")
    run.data.path = str(tmp_path / "v/data")
    for source in ("w", "published"):
        run.train.init_from = str(tmp_path / source)
        with pytest.raises(InputError, match="made with another tokenizer than the model"):
            train.train(run, tmp_path / "x")


def test_a_published_model_is_sampled_from_as_it_is_and_converted(tmp_path, capsys):
    source = shutil.copytree(REFERENCE / "ckpt_a_mha", tmp_path / "source")
    shutil.copy(Path(__file__).parents[1] / "golden" / "tokenizer" / "tokenizer.json", source)
    hf.save_workdir(hf.load(source), tmp_path / "run", source_dir=source)
    flags.FLAGS.mark_as_parsed()
    for place in (source, tmp_path / "run"):
        with flagsaver.flagsaver(checkpoint=str(place), prompt=["a"], gen_length=4):
            sample.main([])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    for wrong in (dict(steps=0), dict(block_length=0), dict(prompt=["[MASK*9999999999]"])):
        with (
            flagsaver.flagsaver(**(dict(checkpoint=str(source), prompt=["a"], gen_length=4) | wrong)),
            pytest.raises(InputError, match="it must be a whole number from 1|more masks than any model"),
        ):
            sample.main([])


@pytest.mark.parametrize(
    "command, message",
    [
        (["llada_jax.train", "--config=configs/pretrain_tiny.py"], "--workdir=DIR are needed"),
        (["llada_jax.train", "--config=configs/pretrain_tiny.py", "--config.train.stepz=3", "--workdir=w"], "stepz"),
        (["llada_jax.train", "--config=configs/pretrain_tiny.py", "--config.train.steps=many", "--workdir=w"], "many"),
        (["llada_jax.train", "--config=configs/none.py", "--workdir=w"], "configs/none.py"),
        (["llada_jax.train", "--config=configs/pretrain_tiny.py", "--workdir=gs://b/w"], "is no gs://BUCKET/NAME"),
        (["llada_jax.train", "--speed=11"], "Unknown command line flag 'speed'"),
        (["llada_jax.sample", "--prompt=x"], "--checkpoint is needed"),
        (["llada_jax.sample", "--prompt=x", "--checkpoint=nowhere"], "nowhere: no config.json"),
        (["llada_jax.sample", "--prompt=x", "--checkpoint=w", "--seed=-1"], "seed"),
        (["llada_jax.sample", "--prompt=x", f"--checkpoint={REFERENCE / 'ckpt_a_mha'}"], "holds no tokenizer.json"),
    ],
)
def test_the_command_line_answers_a_mistake_with_one_line_and_code_2(command, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], done.stderr
    assert not (ROOT / "w").exists()
