"""A preparation is complete or absent, and the same whatever the number of processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import KINDS, prepare
from llada_jax.data.dataset import open_dataset
from llada_jax.data.packing import Packer
from llada_jax.data.prepare import prepare_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError
from llada_jax.files import atomic_directory

ROOT = Path(__file__).parents[2]
TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer")
TEXTS = [f"Document {i}: " + "the quick brown fox, 春风! " * (i % 7) for i in range(60)]
DIALOGUES = [
    [
        {"role": "user", "content": f"question {i}"},
        {"role": "assistant", "content": "yes " * (i + 1)},
    ]
    for i in range(12)
]


def run(output, **options):
    defaults = {"items": TEXTS, "row_length": 32, "workers": 1, "progress": False}
    return prepare_dataset(output, tokenizer=TOKENIZER, **defaults | options)


def read(path):
    source = open_dataset(path)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("packing", ["concatenate", "document"])
@pytest.mark.parametrize("rows_per_shard", [None, 9])
def test_rows_on_disk_are_the_packed_documents(tmp_path, packing, rows_per_shard):
    manifest = run(tmp_path / "d", packing=packing, rows_per_shard=rows_per_shard)
    ids = (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id)
    packer = Packer(32, packing, *ids)
    expected = [row for text in TEXTS for row in packer.add(TOKENIZER.encode(text))] + list(packer.flush())
    written = read(tmp_path / "d")
    assert len(written) == len(expected) == manifest["rows"]
    for row, packed in zip(written, expected, strict=True):
        assert (row["tokens"] == packed["tokens"]).all() and (row["segment_ids"] == packed["segment_ids"]).all()
        assert row["length"] == (packed["segment_ids"] > 0).sum() and row["prompt_length"] == 0
    assert manifest["tokens"] == manifest["scored_tokens"] == sum(row["length"] for row in written)
    assert manifest["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["documents"] == len(TEXTS)
    assert len(manifest["shards"]) == (1 if rows_per_shard is None else -(-len(written) // 9))
    assert load_tokenizer(tmp_path / "d").fingerprint == manifest["tokenizer"]["fingerprint"]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 10)
    items = TEXTS if kind == "text" else DIALOGUES
    options = {"kind": kind, "row_length": 128, "validation_fraction": 0.3, "items": items}
    run(tmp_path / "one", **options)
    run(tmp_path / "two", workers=2, **options)
    for part in ("manifest.json", "lengths.npy", "validation/manifest.json"):
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()


def test_chat_rows(tmp_path):
    manifest = run(tmp_path / "d", kind="chat", items=DIALOGUES, row_length=128)
    assert manifest["rows"] == len(DIALOGUES)
    for row, messages in zip(read(tmp_path / "d"), DIALOGUES, strict=True):
        prompt = TOKENIZER.encode_chat(messages[:1])
        real = prompt + TOKENIZER.encode_answer(messages[1]["content"])
        assert (row["prompt_length"], row["length"]) == (len(prompt), len(real))
        assert row["tokens"].tolist() == real + [TOKENIZER.pad_id] * (128 - len(real))
        assert row["segment_ids"].tolist() == [1] * len(real) + [0] * (128 - len(real))


def test_overlong_dialogues_are_named_or_dropped(tmp_path):
    lines = [json.dumps({"messages": messages}) for messages in DIALOGUES]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    options = {"kind": "chat", "items": None, "files": str(tmp_path / "x.jsonl"), "row_length": 48}
    with pytest.raises(InputError, match=r"x.jsonl:\d+: .* row_length is 48.*overlong=drop"):
        run(tmp_path / "d", **options)
    manifest = run(tmp_path / "d", overlong="drop", **options)
    assert 0 < manifest["dropped"] and manifest["dropped"] + manifest["rows"] == len(DIALOGUES)


def test_validation_takes_its_share_and_nothing_is_lost(tmp_path):
    texts = [f"text {i}" for i in range(400)]
    manifest = run(tmp_path / "d", items=texts, packing="document", validation_fraction=0.1)

    def decoded(path):
        return {TOKENIZER.decode(row["tokens"]) for row in read(path)}

    train, validation = decoded(tmp_path / "d"), decoded(tmp_path / "d" / "validation")
    assert not train & validation and train | validation == set(texts)
    assert len(validation) == pytest.approx(40, abs=20)
    assert manifest["documents"] == len(train)
    run(tmp_path / "longer", items=[*texts, "one more"], packing="document", validation_fraction=0.1)
    assert decoded(tmp_path / "longer" / "validation") - {"one more"} == validation


def test_the_same_preparation_is_reused_and_another_refused(tmp_path):
    (tmp_path / "x.txt").write_text("hello " * 50)
    options = {"items": None, "files": str(tmp_path / "x.txt")}
    first = run(tmp_path / "d", **options)
    written = (tmp_path / "d" / "manifest.json").stat().st_mtime_ns
    assert run(tmp_path / "d", workers=2, **options) == first
    assert (tmp_path / "d" / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="another preparation"):
        run(tmp_path / "d", **options, row_length=16)
    (tmp_path / "x.txt").write_text("other " * 50)
    with pytest.raises(InputError, match="x.txt: changed since .*d was prepared"):
        run(tmp_path / "d", **options)
    with pytest.raises(InputError, match="no prepared dataset"):
        run(tmp_path, **options)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error, workers):
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 10)

    def texts():
        yield from TEXTS
        raise error

    with pytest.raises(error):
        run(tmp_path / "d", items=texts(), workers=workers, rows_per_shard=5)
    assert list(tmp_path.iterdir()) == []


def test_malformed_input_leaves_nothing_and_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "' + "a" * 5000 + '"}\n{"text": 1}\n')
    with pytest.raises(InputError, match="x.jsonl:2"):
        run(tmp_path / "d", items=None, files=str(tmp_path / "x.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_full_disk_names_the_output(tmp_path):
    with (
        pytest.raises(InputError, match="d: no space left"),
        atomic_directory(tmp_path / "d") as path,
    ):
        (path / "half").touch()
        raise RuntimeError("write() failed: No space left on device; writing rows")  # as ArrayRecord
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, words",
    [
        ({"row_length": 1}, "row_length is 1"),
        ({"row_length": 0}, "row_length is 0"),
        ({"packing": "x"}, "packing is 'x'"),
        ({"documents": "x"}, "documents is 'x'"),
        ({"kind": "x"}, "kind is 'x'"),
        ({"kind": "chat"}, r'items\[0\]: needs "messages"'),
        ({"items": [["a"]]}, r"items\[0\]: is a list, not text"),
        ({"items": ["a", "\ud800"]}, r"items\[1\]: character 0 is none of Unicode"),
        ({"files": "a"}, "takes either files or items"),
        ({"items": None}, "takes either files or items"),
        ({"row_length": 2**24 + 1}, "row_length is 16777217"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"items": ["only one"], "validation_fraction": 0.5}, "of 1 documents has no rows"),
        ({"items": []}, "no text"),
    ],
)
def test_mistakes_are_named(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        run(tmp_path / "d", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "file/d", "file", "/proc/d", "a\0b", "caf\udce9"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        run(tmp_path / name)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The command on documents without end, so that it cannot be done before it is killed.
ENDLESS = """
import itertools
from llada_jax import cli
from llada_jax.data import sources
from llada_jax.tools import prepare_data
sources.read_documents = lambda *_: itertools.cycle([{document}])
cli.run(prepare_data.main)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(tmp_path, document, workers=2):
    (tmp_path / "x.txt").write_text("x")
    flags = {"files": "x.txt", "output": "new/d", "row_length": 64, "workers": workers, "tokenizer": TOKENIZER.path}
    command = [sys.executable, "-c", ENDLESS.format(document=document)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )


def wait_for(tmp_path, pattern):
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process):
    """Its exit code, after its workers, which hold its stderr, have ended, too."""
    _, stderr = process.communicate(timeout=20)
    assert "Traceback" not in stderr and "Error" not in stderr
    return process.returncode


@pytest.mark.parametrize("kill, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_killed_command_leaves_no_dataset(tmp_path, kill, code):
    process = start(tmp_path, "'春风 fox ' * 9000")
    wait_for(tmp_path, "new/.d.partial-*/*")  # rows are written
    process.send_signal(kill)
    assert ended(process) == code
    if kill == signal.SIGKILL:  # cannot clean up, so the next preparation does
        assert list(tmp_path.glob("new/.d.partial-*"))
        run(tmp_path / "new" / "d")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["d"]
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
def test_ctrl_c_while_processes_start_is_silent(tmp_path, seconds):
    """A terminal sends it to the whole group."""
    process = start(tmp_path, "'春风 fox ' * 9000")
    wait_for(tmp_path, "new/.d.partial-*")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_kill_does_not_wait_for_a_large_document(tmp_path):
    process = start(tmp_path, "'the quick brown fox ' * 800000", workers=1)
    wait_for(tmp_path, "new/.d.partial-*")
    time.sleep(3)  # until the process is at it
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 143 and time.monotonic() - begun < 5
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_a_worker_that_dies_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 10)
    monkeypatch.setitem(KINDS, "text", dataclasses.replace(KINDS["text"], encode=_die))
    with pytest.raises(InputError, match="a tokenising process died, .* use fewer workers"):
        run(tmp_path / "d", workers=2)
    assert list(tmp_path.iterdir()) == []


def _die(*_):
    os._exit(9)


def test_the_command_says_mistakes_in_one_line(tmp_path):
    (tmp_path / "x.jsonl").write_text("{\n")
    command = [sys.executable, ROOT / "tools" / "prepare_data.py", "--files=x.jsonl", "--output=d"]
    command.append(f"--tokenizer={TOKENIZER.path}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "x.jsonl:1: not JSON" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl"]


def test_commands_make_what_training_reads(tmp_path):
    (tmp_path / "x.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    for tool, flags in [
        ("train_tokenizer.py", ["--files=*.txt", "--output=t.model", "--vocab_size=400"]),
        (
            "prepare_data.py",
            ["--files=*.txt", "--output=d", "--tokenizer=t.model", "--row_length=16"]
            + ["--documents=paragraph", "--validation_fraction=0.2"],
        ),
    ]:
        command = [sys.executable, ROOT / "tools" / tool, *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    source = open_dataset(tmp_path / "d")
    assert source.manifest["documents"] > 30 and source[0]["tokens"].shape == (16,)
    assert np.load(tmp_path / "d" / "validation" / "lengths.npy").dtype == np.int32
