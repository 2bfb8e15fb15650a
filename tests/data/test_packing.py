"""Packing keeps every token once and in order; cuts depend on seed and position alone."""

import numpy as np
import pytest

from llada_jax.data import packing as packing_module
from llada_jax.fields import InputError

BOS, EOS, PAD = 1, 2, 0


def documents(count=40, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(10, 99, draw.integers(0, 23)).tolist() for _ in range(count)]


def pack(docs, row_length, packing):
    packer = packing_module.Packer(row_length, packing, BOS, EOS, PAD)
    rows = [row for ids in docs for row in packer.add(ids)] + list(packer.flush())
    assert [row["length"] for row in rows] == [np.count_nonzero(row["segment_ids"]) for row in rows]
    return np.stack([row["tokens"] for row in rows]), np.stack([row["segment_ids"] for row in rows])


def test_concatenation_by_hand():
    tokens, segments = pack([[7, 8], [9], [3, 4, 5, 6]], 5, "concatenate")
    assert tokens.tolist() == [[1, 7, 8, 2, 1], [9, 2, 1, 3, 4], [5, 6, 2, 0, 0]]
    assert segments.tolist() == [[1, 1, 1, 1, 2], [1, 1, 2, 2, 2], [1, 1, 1, 0, 0]]
    assert tokens.dtype == segments.dtype == np.int32


def test_rows_of_their_own_by_hand():
    tokens, segments = pack([[7, 8], [3, 4, 5, 6], [1, 1, 1]], 5, "document")
    assert tokens.tolist() == [[1, 7, 8, 2, 0], [1, 3, 4, 5, 6], [2, 0, 0, 0, 0], [1, 1, 1, 1, 2]]
    assert segments.tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 0, 0, 0, 0], [1] * 5]


@pytest.mark.parametrize("packing", packing_module.PACKINGS)
@pytest.mark.parametrize("row_length", [2, 7, 64])
def test_every_token_once_and_in_order(packing, row_length):
    tokens, segments = pack(documents(), row_length, packing)
    stream = [id for document in documents() for id in [BOS, *document, EOS]]
    assert tokens[segments > 0].tolist() == stream
    assert (tokens[segments == 0] == PAD).all()
    if packing == "concatenate":
        assert (segments[:-1] > 0).all()
        begins = (tokens == BOS) & (segments > 0)
        later = begins[:, 1:]  # a new segment exactly where a document begins within a row
        assert (np.diff(segments)[:, :][segments[:, 1:] > 0] == later[segments[:, 1:] > 0]).all()
    else:
        assert segments.max() == 1


def test_unknown_packing_is_refused():
    with pytest.raises(InputError, match="packing is 'tight'"):
        pack([[1]], 4, "tight")


def batch(size=4000, length=12):
    draw = np.random.default_rng(3)
    segments = np.sort(draw.integers(1, 4, (size, length)), axis=1)
    segments[: size // 2, length - 3 :] = 0
    return np.where(segments > 0, draw.integers(10, 99, (size, length)), PAD), segments


@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_random_lengths_cut_their_fraction_uniformly(fraction):
    tokens, segments = batch()
    cut_tokens, cut_segments = packing_module.random_length(
        tokens, segments, np.arange(4000), fraction=fraction, seed=5, pad_id=PAD
    )
    kept = cut_segments > 0
    assert (cut_tokens[kept] == tokens[kept]).all() and (cut_tokens[~kept] == PAD).all()
    assert (np.diff(kept.astype(int)) <= 0).all() and kept[:, 0].all()  # a prefix, never empty
    lengths = kept[2000:].sum(1)  # of the full rows
    assert np.mean(lengths < 12) == pytest.approx(fraction * 11 / 12, abs=0.03)
    if fraction == 1.0:
        assert np.bincount(lengths, minlength=13)[1:] / 2000 == pytest.approx(1 / 12, abs=0.03)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_a_split_parts_its_fraction_of_the_rows(fraction):
    _, segments = batch()
    split = packing_module.split_in_two(segments, np.arange(4000), fraction=fraction, seed=5)
    assert ((split > 0) == (segments > 0)).all()
    changed = (split != segments).any(1)
    assert changed.mean() == pytest.approx(fraction, abs=0.03)
    for before, after in zip(segments[changed][:200], split[changed][:200], strict=True):
        cut = int(np.argmax(before != after))
        assert 0 < cut < (before > 0).sum()
        assert not set(after[:cut]) & set(after[cut:][after[cut:] > 0])
        borders = np.flatnonzero(np.diff(before))  # documents stay parted where they were
        assert set(borders) <= set(np.flatnonzero(np.diff(after)))


def test_cuts_do_not_depend_on_the_batch_a_row_is_in():
    tokens, segments = batch()
    positions = np.arange(10**12, 10**12 + 4000)

    def both(rows_of):
        cut = packing_module.random_length(
            tokens[rows_of], segments[rows_of], positions[rows_of], fraction=0.5, seed=5, pad_id=PAD
        )[1]
        return packing_module.split_in_two(cut, positions[rows_of], fraction=0.5, seed=5)

    assert (both(slice(None))[1000:1003] == both(slice(1000, 1003))).all()
    assert (both(slice(None))[[7]] == both([7])).all()


def test_uniform_is_uniform_and_differs_by_seed_and_stream():
    draws = [packing_module.uniform(*key, np.arange(20000)) for key in [(0, 0), (0, 1), (1, 0), (-3, 0)]]
    for values in draws:
        assert np.histogram(values, 10, (0, 1))[0] / 20000 == pytest.approx(0.1, abs=0.01)
        assert 0 <= values.min() and values.max() < 1
    correlations = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlations).max() < 0.03
