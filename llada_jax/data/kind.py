"""What a kind of data is: how its files are read, encoded into records and collated into batches.

A kind is one file of this room and one line of `KINDS` (data/__init__.py). A record is a dict of named arrays, whose
names, dtypes and shapes the manifest of a dataset holds. G rows of the global batch, B of them for this process.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from llada_jax.data.tokenizer import Tokenizer

LONGEST_ROW = 2**24  # tokens
OVERLONG = ("error", "drop")  # what becomes of an example that is longer than a row

Record = Mapping[str, Any]  # an array or a number for each field; "length" is one of them
Batch = dict[str, np.ndarray]  # named arrays [B, ...]


class Field(NamedTuple):
    """One array of a record. Its integers are checked to be from 0 to below `below`, unless that is None."""

    dtype: str  # of NumPy
    shape: tuple[int, ...]
    below: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of a preparation: what rows depend on besides the files and the tokenizer."""

    kind: str
    row_length: int
    packing: str
    documents: str
    overlong: str
    validation_fraction: float
    rows_per_shard: int


@dataclasses.dataclass
class Encoded:
    """What one item of a file (a document, a dialogue) becomes."""

    examples: list[Any]  # records; for a kind with `pack`: what that takes
    scored_tokens: int  # those that a loss may ask for
    bytes: int  # of the text of these tokens, UTF-8
    dropped: int = 0  # examples left out because they are longer than a row


class Packer(Protocol):
    """Makes records out of the examples of many items."""

    def add(self, example: Any, /) -> Iterator[Record]: ...

    def flush(self) -> Iterator[Record]: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """What a batch may depend on besides its rows; the same on every process, but for the choice of positions."""

    positions_B: np.ndarray  # int64; of the rows in the order of training
    longest: Callable[[str], int]  # the largest "length" of the rows of a kind in the global batch; 0: it has none
    seed: int  # of the run
    eos_id: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of data.

    read: (path, plan) -> pairs (place as "file:line", item). An item is text, or lists and dicts of text and numbers.
    encode: (item, place, tokenizer, plan) -> Encoded. Runs in worker processes. Checks the item: InputError names the
        place.
    fields: (row_length, vocab_size) -> the fields of a record, in the order of its bytes. "length" must be one, int32
        with shape (): how many tokens of the record are not padding.
    collate: (records of this process, Place, **options) -> batch, with "maskable" bool [B, L]. Called from threads.
    pack: (plan, tokenizer) -> Packer, if records are made of the examples of several items.
    options: the fields of config.data that `collate` takes as keywords; each has a default there.
    """

    read: Callable[[str, Plan], Iterable[tuple[str, Any]]]
    encode: Callable[[Any, str, Tokenizer, Plan], Encoded]
    fields: Callable[[int, int], dict[str, Field]]
    collate: Callable[..., Batch]
    pack: Callable[[Plan, Tokenizer], Packer] | None = None
    options: tuple[str, ...] = ()


def stack(records: Sequence[Record]) -> Batch:
    """The fields of all records, each as one array [B, ...]."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}
