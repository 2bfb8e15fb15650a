"""Slices of published tensors, a few megabytes at a time."""

import numpy as np
import pytest
from reference import REFERENCE
from safetensors.numpy import load_file

from llada_jax.fields import InputError
from llada_jax.interop import safetensors_io

SHARDED = REFERENCE / "ckpt_a_mha_sharded"
WTE, NORM = "model.transformer.wte.weight", "model.transformer.ln_f.weight"


@pytest.mark.parametrize("index", [np.s_[0:512, 0:64], np.s_[3:501, 0:64], np.s_[0:512, 5:6], np.s_[17:18, 60:64]])
def test_chunks_are_the_slice_in_small_pieces(monkeypatch, index):
    monkeypatch.setattr(safetensors_io, "_CHUNK_BYTES", 1000)
    stored = safetensors_io.read_directory(SHARDED)[WTE]
    wanted = load_file(stored.path)[WTE][index]
    found = np.full(wanted.shape, np.nan, np.float32)
    for rows, values in stored.chunks(index):
        assert values.nbytes <= 1000 and np.isnan(found[rows]).all()
        found[rows] = values
    np.testing.assert_array_equal(found, wanted)


def test_a_row_longer_than_a_piece_is_read_whole(monkeypatch):
    monkeypatch.setattr(safetensors_io, "_CHUNK_BYTES", 1)
    tensors = safetensors_io.read_directory(SHARDED)
    assert [values.shape for _, values in tensors[WTE].chunks(np.s_[2:4, 0:64])] == [(1, 64)] * 2
    assert [values.shape for _, values in tensors[NORM].chunks(tensors[NORM].whole)] == [(1,)] * 64


def test_a_file_that_went_away_after_its_header_was_read_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((REFERENCE / "ckpt_b_gqa_tied" / "model.safetensors").read_bytes())
    stored = safetensors_io.read_directory(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="model.safetensors: .*truncated"):
        list(stored[NORM].chunks(stored[NORM].whole))
    path.unlink()
    with pytest.raises(InputError, match="model.safetensors: not a file"):
        list(stored[NORM].chunks(stored[NORM].whole))


def test_a_tensor_larger_than_a_shard_has_one_to_itself():
    layout = [(name, "F32", (size,)) for name, size in dict(a=10, b=300, c=15, d=10, e=90).items()]
    shards, index = safetensors_io.shards(layout, 100)
    held = sorted(sorted(name for name, _, _ in tensors) for tensors in shards.values())
    assert held == [["a", "c"], ["b"], ["d"], ["e"]] and '"total_size": 1700' in index
    one, _ = safetensors_io.shards(layout, 1700)
    assert list(one) == ["model.safetensors"]
