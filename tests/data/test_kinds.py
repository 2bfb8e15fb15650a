"""A further kind of data is one file and one line: here a file of pairs, registered by this test alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from llada_jax.data import KINDS, sources
from llada_jax.data.dataset import DamagedRow, open_dataset
from llada_jax.data.kind import Encoded, Field, Kind, stack
from llada_jax.data.pipeline import batches, ordered, require_fields
from llada_jax.data.prepare import prepare_dataset
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.fields import InputError

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "golden" / "tokenizer")
LENGTH = 24

# What would be the file of the kind.


def read(path, plan):
    return sources.read_jsonl(path, '{"left": …, "right": …, "weight": …}')


def encode(item, where, tokenizer, plan):
    if item["weight"] < 0:
        raise InputError(f"{where}: weight {item['weight']} is negative")
    left, right = tokenizer.encode(item["left"]), tokenizer.encode(item["right"])
    record = {
        "left": np.asarray(left + [tokenizer.pad_id] * (plan.row_length - len(left))),
        "right": np.asarray(right + [tokenizer.pad_id] * (plan.row_length // 2 - len(right))),
        "weight": item["weight"],
        "length": len(left) + len(right),
    }
    return Encoded([record], scored_tokens=len(right), bytes=len(item["right"].encode()))


def fields(row_length, vocab_size):
    return {
        "left": Field("int32", (row_length,), vocab_size),
        "right": Field("int32", (row_length // 2,), vocab_size),
        "weight": Field("float32", ()),
        "length": Field("int32", (), 2 * row_length),
    }


def collate(records, place, *, scale=1.0):
    pairs = stack(records)
    longest = np.full(len(records), place.longest("pairs"))
    return pairs | {"weight": scale * pairs["weight"], "longest": longest, "maskable": pairs["right"] > 0}


@pytest.fixture(autouse=True)
def pairs_are_a_kind(monkeypatch):
    monkeypatch.setitem(KINDS, "pairs", Kind(read, encode, fields, collate, options=("scale",)))


def items(count, start=0):
    return [{"left": f"left {i}" * (i % 3), "right": f"r {i}", "weight": i / 7} for i in range(start, start + count)]


@pytest.fixture
def paths(tmp_path, pairs_are_a_kind):
    common = {"tokenizer": TOKENIZER, "row_length": LENGTH, "workers": 1, "progress": False}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, items(30))))
    prepare_dataset(tmp_path / "files", kind="pairs", files=str(tmp_path / "x.jsonl"), rows_per_shard=7, **common)
    prepare_dataset(tmp_path / "memory", kind="pairs", items=items(11, 50), **common)
    prepare_dataset(tmp_path / "text", items=["text"], **common)
    return tmp_path


def test_its_records_are_read_as_they_were_encoded(paths):
    source = open_dataset(paths / "files")
    assert (source.kind, len(source), len(source.manifest["shards"])) == ("pairs", 30, 5)
    for i, item in enumerate(items(30)):
        record, left, right = source[i], TOKENIZER.encode(item["left"]), TOKENIZER.encode(item["right"])
        assert record["left"].tolist() == left + [TOKENIZER.pad_id] * (24 - len(left))
        assert record["right"].tolist() == right + [TOKENIZER.pad_id] * (12 - len(right))
        assert record["weight"] == np.float32(i / 7) and record["length"] == len(left) + len(right)
    manifest = json.loads((paths / "files" / "manifest.json").read_text())
    assert manifest["fields"]["right"] == {"dtype": "int32", "shape": [12], "below": 512}
    assert manifest["scored_tokens"] == sum(len(TOKENIZER.encode(item["right"])) for item in items(30))
    assert manifest["tokens"] == source.lengths.sum()


def test_its_batches_are_mixed_shared_and_resumed_like_others(paths):
    def take(**options):
        order = ordered([open_dataset(paths / name) for name in ("files", "memory")], [1.0, 0.5], seed=3)
        common = {"batch_size": 6, "kind": "pairs", "num_steps": 9, "seed": 1, "eos_id": 2, "scale": 7.0}
        return list(batches(order, **common | {"start_step": 0} | options))

    whole = take()
    mixed = {float(x) for batch in whole for x in batch["weight"]}
    assert any(x < 30 for x in mixed) and any(x >= 50 for x in mixed)
    for batch in whole:
        assert (batch["left"].shape, batch["right"].shape, batch["weight"].dtype) == ((6, 24), (6, 12), np.float32)
        assert (batch["longest"] == batch["length"].max()).all()
    shares = [take(only=rows) for rows in ([0, 4], [1, 2, 3, 5])]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name, x in batch.items():
            assert (x[[0, 4]] == first[name]).all() and (x[[1, 2, 3, 5]] == second[name]).all()
    for batch, again in zip(whole[5:], take(start_step=5), strict=True):
        assert all((batch[name] == again[name]).all() for name in batch)


def test_its_mistakes_are_named(paths):
    common = {"kind": "pairs", "tokenizer": TOKENIZER, "row_length": LENGTH, "progress": False}
    with pytest.raises(InputError, match=r"items\[1\]: weight -1 is negative"):
        prepare_dataset(paths / "d", items=[items(1)[0], items(1)[0] | {"weight": -1}], **common)
    take = lambda kind, name, **options: batches(
        ordered([open_dataset(paths / name)]), batch_size=1, kind=kind, start_step=0, num_steps=1, seed=0, eos_id=2,
        **options,
    )  # fmt: skip
    with pytest.raises(InputError, match="text: its rows, of kind 'text', are not what kind 'pairs' reads .left"):
        take("pairs", "text")
    with pytest.raises(InputError, match="files: its rows, of kind 'pairs', are not what kind 'text' reads"):
        take("text", "files")
    with pytest.raises(InputError, match="split_fraction is no option of kind 'pairs'"):
        take("pairs", "files", split_fraction=0.5)


def test_numbers_out_of_the_range_of_the_kind_are_not_read(paths):
    """Whoever writes a dataset by other means may leave the range of a field out, or take a larger one."""
    place = paths / "files" / "manifest.json"
    for below, refused in [(512, False), (100, False), (513, True), (None, True)]:
        manifest = json.loads(place.read_text())
        manifest["fields"]["left"]["below"] = below
        place.write_text(json.dumps(manifest))
        source = open_dataset(paths / "files")
        if refused:
            with pytest.raises(InputError, match="files: its rows, .* are not what kind 'pairs' reads"):
                require_fields([source], "pairs")
        else:
            require_fields([source], "pairs")


def test_its_damage_is_found(paths):
    shard = next((paths / "memory").glob("rows-*"))
    data = bytearray(shard.read_bytes())
    start = data.find(b"\x28\xb5\x2f\xfd")  # zstd, in the first record
    data[start + 15] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedRow, match="record 0 cannot be read"):
        open_dataset(paths / "memory")[0]
