"""A dataset on disk is what its manifest says, also one of an older version; anything else is refused."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import dataset as dataset_module
from llada_jax.data.dataset import decode_record, encode_record, open_dataset, record_dtype
from llada_jax.data.kind import Field
from llada_jax.data.prepare import prepare_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER = load_tokenizer(GOLDEN / "tokenizer")
FIELDS = {
    "tokens": Field("int32", (3,), 10),
    "flags": Field("bool", (2, 2)),
    "weight": Field("float32", ()),
    "length": Field("int32", (), 4),
}
DTYPE = record_dtype(FIELDS)
RECORD = {
    "tokens": np.asarray([1, 9, 3]),
    "flags": np.asarray([[True, False], [False, True]]),
    "weight": -0.5,
    "length": 3,
}


def test_a_record_is_its_fields_one_after_the_other_little_endian():
    data = encode_record(RECORD, DTYPE)
    assert data == struct.pack("<3i4?fi", 1, 9, 3, True, False, False, True, -0.5, 3)
    read = decode_record(data, FIELDS, DTYPE, _crc32(data))
    assert list(read) == list(FIELDS)
    for name, field in FIELDS.items():
        assert read[name].dtype == field.dtype and read[name].shape == field.shape
        assert (read[name] == RECORD[name]).all()


def _crc32(data):
    """Bit by bit, as in its definition."""
    rest = 0xFFFFFFFF
    for byte in data:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0xEDB88320 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    "change", [dict(tokens=np.asarray([1, 10, 3])), dict(tokens=np.asarray([-1, 1, 3])), dict(length=4)]
)
def test_a_record_with_numbers_out_of_range_is_not_read(change):
    data = encode_record(RECORD | change, DTYPE)
    with pytest.raises(ValueError, match=f"its {next(iter(change))} are not from 0 to below"):
        decode_record(data, FIELDS, DTYPE, _crc32(data))


@pytest.mark.parametrize("size", [0, 27, 29])
def test_a_record_of_another_size_is_not_read(size):
    data = bytes(size)
    with pytest.raises(ValueError):
        decode_record(data, FIELDS, DTYPE, _crc32(data))


def test_a_dataset_without_named_fields_is_rows_of_tokens():
    """One that was prepared before datasets named their fields, of the dialogues below."""
    source = open_dataset(GOLDEN / "rows_v2")
    tokenizer = load_tokenizer(source.tokenizer_path)
    assert "fields" not in source.manifest and (len(source), source.scored_tokens) == (4, None)
    for i in range(4):
        prompt = tokenizer.encode_chat([{"role": "user", "content": f"q {i}"}])
        whole = prompt + tokenizer.encode_answer("yes " * (i + 1))
        row = source[i]
        assert row["tokens"].tolist() == whole + [tokenizer.pad_id] * (64 - len(whole))
        assert row["segment_ids"].tolist() == [1] * len(whole) + [0] * (64 - len(whole))
        assert (row["prompt_length"], row["length"]) == (len(prompt), len(whole))


@pytest.fixture
def dataset(tmp_path):
    texts = [f"text {i}" for i in range(20)]
    prepare_dataset(tmp_path / "d", items=texts, tokenizer=TOKENIZER, row_length=16, rows_per_shard=4, progress=False)
    return tmp_path / "d"


def refused(path, words):
    with pytest.raises(InputError, match=words) as caught:
        open_dataset(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_damaged_files_are_named(dataset, tmp_path):
    refused(tmp_path / "nowhere", "no dataset there")
    refused(tmp_path / ("x" * 300), "no dataset there")
    shards = sorted(dataset.glob("rows-*"))
    data = shards[0].read_bytes()
    shards[0].write_bytes(data[:-100])
    refused(dataset, f"{shards[0].name}: has .* bytes")
    shards[0].write_bytes(bytes(len(data)))
    with pytest.raises(InputError, match="cannot be read"):
        open_dataset(dataset)[0]
    np.save(dataset / "lengths.npy", np.zeros(3, np.int32))
    shards[0].write_bytes(data)
    refused(dataset, "lengths.npy has 3 rows")
    shards[1].unlink()
    refused(dataset, f"{shards[1].name}: is missing")


def test_datasets_may_move_between_starts_of_a_run_but_not_change(dataset, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    (tmp_path / "w").mkdir()
    dataset_module.require_unchanged(tmp_path / "w", [dataset, other])
    begun = (tmp_path / "w" / "inputs.json").read_bytes()
    moved = dataset.rename(tmp_path / "moved")
    dataset_module.require_unchanged(tmp_path / "w", [moved, other])
    assert (tmp_path / "w" / "inputs.json").read_bytes() == begun

    def refused(directories, words):
        with pytest.raises(InputError, match=f"{words} since the run in .*w began"):
            dataset_module.require_unchanged(tmp_path / "w", directories)

    refused([moved], "other/manifest.json: is gone")
    refused([moved, other, shutil.copytree(moved, tmp_path / "third")], "third/manifest.json: is new")
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + " ")
    refused([moved, other], "other/manifest.json: changed")
    refused([other, moved], "other/manifest.json: changed")  # another order is another run
    (moved / "chat_template.jinja").write_text("x")
    refused([moved, other], "moved/chat_template.jinja: is new")


def test_a_run_that_began_in_an_older_version_goes_on(dataset, tmp_path):
    """Which stored the files of the workdir by names relative to it."""
    workdir = tmp_path / "w"
    shutil.copytree(dataset, workdir / "data")
    hashes = lambda path: {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in ("manifest.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    }
    begun = {f"data/{name}": sha for name, sha in hashes(workdir / "data").items()}
    begun |= {f"{dataset}/{name}": sha for name, sha in hashes(dataset).items()}
    (workdir / "inputs.json").write_text(json.dumps(begun))
    dataset_module.require_unchanged(workdir, [workdir / "data", dataset])
    (workdir / "data" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="w/data/manifest.json: changed"):
        dataset_module.require_unchanged(workdir, [workdir / "data", dataset])


LENGTH = {"dtype": "int32", "shape": []}
WRONG = {
    "format": ["other", None, "llada_jax.rows.v1"],
    "kind": [None, 3, ["text"]],
    "row_length": [1, 2**24 + 1, "16", 16.0, True],
    "rows": [-1, 10**6, None],
    "tokens": [-1, 2**63, "x"],
    "scored_tokens": [-1, None, 0.5],
    "shards": [[], {}, [{}], [{"file": "x", "rows": 0, "bytes": 1}]],
    "tokenizer": [None, {}, {"fingerprint": "x", "vocab_size": 2**31}],
    "fields": [
        None,
        [],
        {},
        {"tokens": LENGTH},  # no length
        {"length": {"dtype": "int64", "shape": []}},
        {"length": {"dtype": "int32", "shape": [1]}},
        {"length": {"dtype": "int32"}},
        {"length": LENGTH, "x": {"dtype": "object", "shape": []}},
        {"length": LENGTH, "x": {"dtype": ["int32"], "shape": []}},
        {"length": LENGTH, "x": {"dtype": "int32", "shape": [0]}},
        {"length": LENGTH, "x": {"dtype": "int32", "shape": [-1]}},
        {"length": LENGTH, "x": {"dtype": "int32", "shape": [1] * 9}},
        {"length": LENGTH, "x": {"dtype": "int32", "shape": [2**20, 2**20]}},
        {"length": LENGTH, "x": {"dtype": "int32", "shape": [1], "below": -1}},
        {"length": LENGTH, "x": {"dtype": "int8", "shape": [], "below": 129}},
        {"length": LENGTH, "x": {"dtype": "float32", "shape": [], "below": 1}},
        {"length": LENGTH, "x": 3},
        {"length": LENGTH, "": LENGTH},
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_with_a_wrong_value_is_refused(dataset, name):
    manifest = json.loads((dataset / "manifest.json").read_text())
    for value in WRONG[name]:
        (dataset / "manifest.json").write_text(json.dumps(manifest | {name: value}))
        refused(dataset, "manifest.json: ")
