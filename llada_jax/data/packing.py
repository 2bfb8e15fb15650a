"""Rows of tokens: how documents are packed into them, how batches of them are cut and split.

Pure functions on ids. Shapes: B rows of a batch, L positions of a row, N ids of a document, any number.
A segment id is 0 at padding and counts the documents of a row from 1.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llada_jax.data.kind import Batch, Field, Record
from llada_jax.fields import InputError

PACKINGS = ("concatenate", "document")


def row_fields(row_length: int, vocab_size: int) -> dict[str, Field]:
    """The fields of a row of tokens: tokens and segment_ids int32 [L], prompt_length and length int32."""
    return {
        "tokens": Field("int32", (row_length,), vocab_size),
        "segment_ids": Field("int32", (row_length,), row_length + 1),
        "prompt_length": Field("int32", (), row_length + 1),  # 0: running text
        "length": Field("int32", (), row_length + 1),  # positions that are not padding
    }


class Packer:
    """Packs documents, each between BOS and EOS, into rows as they come.

    "concatenate" (LLaDA): one stream cut to rows, only the last row is padded; the rest of a cut
    document is segment 1 of the next row. "document": every document begins a row of its own.
    """

    def __init__(self, row_length: int, packing: str, bos_id: int, eos_id: int, pad_id: int):
        if packing not in PACKINGS:
            raise InputError(f"packing is {packing!r}, must be one of {', '.join(PACKINGS)}")
        self._row_length, self._packing = row_length, packing
        self._bos_id, self._eos_id, self._pad_id = bos_id, eos_id, pad_id
        self._begin_row()

    def add(self, ids: Sequence[int] | np.ndarray, /) -> Iterator[Record]:
        """Takes a document; yields the rows that are complete now (see `row_fields`)."""
        ids_N = np.concatenate([[self._bos_id], ids, [self._eos_id]]).astype(np.int32)
        start = 0
        while start < len(ids_N):
            part_N = ids_N[start : start + self._row_length - self._filled]
            start += len(part_N)
            end = self._filled + len(part_N)
            self._segment += 1
            self._tokens_L[self._filled : end] = part_N
            self._segment_ids_L[self._filled : end] = self._segment
            self._filled = end
            if end == self._row_length or self._packing == "document":
                yield from self.flush()

    def flush(self) -> Iterator[Record]:
        """Yields the row begun, padded, if there is one."""
        if self._filled:
            row = _row(self._tokens_L, self._segment_ids_L, 0, self._filled)
            self._begin_row()
            yield row

    def _begin_row(self):
        self._tokens_L = np.full(self._row_length, self._pad_id, np.int32)
        self._segment_ids_L = np.zeros(self._row_length, np.int32)
        self._filled = self._segment = 0


def padded_row(tokens_N: np.ndarray, row_length: int, pad_id: int, prompt_length: int) -> Record:
    """A row of one segment, padded to `row_length`, which must not be shorter than the tokens."""
    segment_ids_L = (np.arange(row_length) < len(tokens_N)).astype(np.int32)
    tokens_L = np.full(row_length, pad_id, np.int32)
    tokens_L[: len(tokens_N)] = tokens_N
    return _row(tokens_L, segment_ids_L, prompt_length, len(tokens_N))


def _row(tokens_L: np.ndarray, segment_ids_L: np.ndarray, prompt_length: int, length: int) -> Record:
    return {"tokens": tokens_L, "segment_ids": segment_ids_L, "prompt_length": prompt_length, "length": length}


def token_batch(tokens_BL: np.ndarray, segment_ids_BL: np.ndarray, maskable_BL: np.ndarray) -> Batch:
    """tokens and segment_ids int32 [B, L], maskable bool [B, L], answer_length int32 [B]: how many are maskable."""
    return {
        "tokens": tokens_BL.astype(np.int32, copy=False),
        "segment_ids": segment_ids_BL.astype(np.int32, copy=False),
        "maskable": maskable_BL,
        "answer_length": maskable_BL.sum(1, dtype=np.int32),
    }


def random_length(
    tokens_BL: np.ndarray,
    segment_ids_BL: np.ndarray,
    positions_B: np.ndarray,
    *,
    fraction: float,
    seed: int,
    pad_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a fraction of the rows to a length ~ U{1..L}, the rest being padding (LLaDA §2.2: 1%).

    Which rows and where depends only on the seed and the row's position in the global order.
    """
    length = tokens_BL.shape[1]
    chosen_B = uniform(seed, 0, positions_B) < fraction
    lengths_B = np.where(chosen_B, 1 + (uniform(seed, 1, positions_B) * length).astype(np.int64), length)
    beyond_BL = np.arange(length) >= lengths_B[:, None]
    return np.where(beyond_BL, pad_id, tokens_BL), np.where(beyond_BL, 0, segment_ids_BL)


def split_in_two(segment_ids_BL: np.ndarray, positions_B: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Segment ids in which a fraction of the rows is split at a random point (iLLaDA: 30%).

    No segment spans the split, so attention within segments does not cross it. Which rows and where
    depends only on the seed and the row's position in the global order.
    """
    lengths_B = (segment_ids_BL > 0).sum(1)
    chosen_B = (uniform(seed, 2, positions_B) < fraction) & (lengths_B > 1)
    cuts_B = 1 + (uniform(seed, 3, positions_B) * (lengths_B - 1)).astype(np.int64)
    after_BL = np.arange(segment_ids_BL.shape[1]) >= cuts_B[:, None]
    renumbered_BL = segment_ids_BL + segment_ids_BL.max(1, keepdims=True)
    return np.where(chosen_B[:, None] & after_BL & (segment_ids_BL > 0), renumbered_BL, segment_ids_BL)


def uniform(seed: int, stream: int, positions: np.ndarray) -> np.ndarray:
    """Float64 in [0, 1) for each position: a splitmix64 hash of (seed, stream, position)."""
    state = _mix(np.asarray([seed % 2**64], np.uint64))
    state = _mix(state ^ np.uint64(stream))
    return (_mix(state ^ _mix(np.asarray(positions, np.uint64))) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
