"""Makes batches of rows: which rows a step has is a pure function of (seed, step). Grain reads them.

Shapes: G rows of the global batch, B of them for this process, L positions of a row.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from llada_jax.data import KINDS, packing
from llada_jax.data.dataset import DamagedRow, RowSource
from llada_jax.data.kind import Batch, Field, Place, Record
from llada_jax.data.sources import check_unicode
from llada_jax.fields import InputError
from llada_jax.storage.buckets import path_of

_LEAST_WEIGHT, _MOST_WEIGHT = 1e-6, 1e6  # of a dataset in a mixture
_TABLE_ROWS = 2**16  # up to here the order of an epoch is held as a table

OnDamage = Callable[[int, str, str], object]  # called with the position in the order, the cause and what is done


@dataclasses.dataclass(frozen=True)
class Order:
    """The infinite global order of rows. With `on_damage`, a row that cannot be read is replaced by its stand-in."""

    sources: tuple[RowSource, ...]
    places: grain.MapDataset
    on_damage: OnDamage | None = None

    def place(self, position: int) -> tuple[int, int]:
        """The (source, row) of a position, without reading it."""
        place = self.places[position]
        assert place is not None  # grain's way to filter, not used here
        return place

    def read(self, position: int) -> tuple[Record, bool]:
        """The record of a position, and whether it is the stand-in for one that cannot be read."""
        number, row = self.place(position)
        source = self.sources[number]
        try:
            return source[row], False
        except DamagedRow as error:
            if self.on_damage is None:
                raise InputError(f"{error}, or set config.data.on_damage to 'skip'") from error
            other = source.stand_in(row)
            self.on_damage(position, str(error), f"row {other} of the dataset stands in for row {row}")
            return source[other], True


def parse_mixture(mixture: Sequence[Any]) -> list[tuple[Path, float]]:
    """(directory, weight) pairs of config.data.mixture. Raises InputError for anything else."""
    pairs = []
    for i, entry in enumerate(mixture):
        is_pair = isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str) and entry[0]
        if not is_pair or not _is_weight(entry[1]):
            raise InputError(
                f"config.data.mixture[{i}] is {str(entry)[:60]!r}, must be (directory, weight), the weight from "
                f"{_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
            )
        pairs.append((path_of(check_unicode(entry[0], f"config.data.mixture[{i}]")), float(entry[1])))
    return pairs


def _is_weight(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and _LEAST_WEIGHT <= x <= _MOST_WEIGHT


def ordered(
    sources: Sequence[RowSource],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    on_damage: OnDamage | None = None,
) -> Order:
    """The order of training: a pure function of (seed, position), whatever the hosts and the start.

    Every source is shuffled by index and anew in each of its epochs; positions are dealt to the
    sources in proportion to `weights` (rows, not tokens; equal if None). A damaged row is an InputError that names
    the file and the record, or with `on_damage` replaced; see `Order`.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if not sources or len(weights) != len(sources) or not all(map(_is_weight, weights)):
        wanted = f"each needs one from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}"
        raise InputError(f"weights are {weights} for {len(sources)} datasets; {wanted}")
    lengths = {source.row_length for source in sources}
    fingerprints = {source.manifest["tokenizer"]["fingerprint"] for source in sources}
    paths = ", ".join(str(source.path) for source in sources)
    if len(lengths) > 1:
        raise InputError(f"{paths}: row lengths {sorted(lengths)} differ; prepare them with one --row_length")
    if len(fingerprints) > 1:
        raise InputError(f"{paths}: made with different tokenizers; prepare them with one --tokenizer")
    parts = []
    for i, source in enumerate(sources):
        # Grain adds the epoch to the seed: without hashing, seed 1 would repeat epoch 1 of seed 0.
        shuffle_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        parts.append(_shuffled(len(source), shuffle_seed).map(functools.partial(_place, i)))
    places = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
    return Order(tuple(sources), places, on_damage)


def _shuffled(size: int, seed: int) -> grain.MapDataset:
    """The indices below `size` without end, every epoch in another order."""
    if size > _TABLE_ROWS:
        return grain.MapDataset.range(size).shuffle(seed=seed).repeat()
    # Grain 0.2.18 shuffles by a 16-bit cipher, walked until it meets an index below `size`: at 300
    # rows that takes 0.2 ms an index.
    return grain.MapDataset.range(sys.maxsize).map(functools.partial(_look_up, size, seed))


def _look_up(size: int, seed: int, position: int) -> int:
    epoch, index = divmod(position, size)
    return int(_epoch_table(size, seed, epoch)[index])


@functools.lru_cache(maxsize=64)  # at most 32 MB
def _epoch_table(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.argsort(packing.uniform(seed, epoch, np.arange(size)), kind="stable")


def _place(source: int, row: int) -> tuple[int, int]:
    return source, row


def batches(
    order: Order,
    *,
    batch_size: int,
    kind: str,
    start_step: int,
    num_steps: int,
    seed: int,
    eos_id: int,
    only: Sequence[int] | np.ndarray | None = None,
    threads: int = 4,
    prefetch: int = 8,
    **options: Any,
) -> Iterator[Batch]:
    """Batches of steps start_step, …, num_steps - 1; row j of step s is order.read(s * batch_size + j).

    Each is what `collate` of the kind makes of the rows that `only` names (those of this process; None: all); no other
    rows are read. Where damaged rows are replaced, "replaced" bool [B] says which ones were. `options` are those of the
    kind. `prefetch` batches are made ahead by `threads`.
    """
    require_fields(order.sources, kind)
    for name in options:
        if name not in KINDS[kind].options:
            raise InputError(f"{name} is no option of kind {kind!r}; leave it out")
    make = functools.partial(
        _make_batch,
        order=order,
        batch_size=batch_size,
        only=range(batch_size) if only is None else only,
        collate=functools.partial(KINDS[kind].collate, **options),
        seed=seed,
        eos_id=eos_id,
    )
    steps = grain.MapDataset.range(start_step, max(num_steps, start_step))
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(steps.map(make).to_iter_dataset(read))


def require_fields(sources: Sequence[RowSource], kind: str) -> None:
    """Raises InputError for an unknown kind, and for a dataset whose rows do not have the fields of that kind.

    Datasets of other kinds may be mixed in if they have the same fields, such as text among dialogues.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    for source in sources:
        wanted = KINDS[kind].fields(source.row_length, source.manifest["tokenizer"]["vocab_size"])
        if list(source.fields) != list(wanted) or not all(map(_fits, source.fields.values(), wanted.values())):
            raise InputError(
                f"{source.path}: its rows, of kind {source.kind!r}, are not what kind {kind!r} reads "
                f"({', '.join(wanted)}); prepare it with --kind={kind}"
            )


def _fits(field: Field, wanted: Field) -> bool:
    """Whether a field holds what is wanted, and only numbers that are allowed there."""
    bounded = wanted.below is None or (field.below is not None and field.below <= wanted.below)
    return field[:2] == wanted[:2] and bounded


def _make_batch(
    step: int,
    *,
    order: Order,
    batch_size: int,
    only: Sequence[int] | np.ndarray,
    collate: Callable[..., Batch],
    seed: int,
    eos_id: int,
) -> Batch:
    positions_G = range(step * batch_size, (step + 1) * batch_size)
    positions_B = np.asarray([positions_G[row] for row in only])
    records, replaced = zip(*(order.read(int(g)) for g in positions_B), strict=True)
    batch = collate(records, Place(positions_B, functools.partial(_longest, order, positions_G), seed, eos_id))
    return batch if order.on_damage is None else batch | {"replaced": np.asarray(replaced)}


def _longest(order: Order, positions_G: range, kind: str) -> int:
    """The largest length of the rows of a kind in the global batch, which every process finds without reading them."""
    longest = 0
    for source, row in map(order.place, positions_G):
        if order.sources[source].kind == kind:
            longest = max(longest, int(order.sources[source].lengths[row]))
    return longest
