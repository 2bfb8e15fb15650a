"""Rows become batches: the rows of a step are a pure function of (seed, step), read by Grain.

Shapes: G rows of the global batch, B of them for this process, L positions of a row.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from llada_jax.data import packing
from llada_jax.data.dataset import KINDS, DamagedRow, RowSource
from llada_jax.fields import InputError

ON_DAMAGE = ("stop", "skip")

_TABLE_ROWS = 2**16  # up to here the order of an epoch is held as a table

OnDamage = Callable[[int, str, str], object]  # is told the position in the order, the cause and what is done


@dataclasses.dataclass(frozen=True)
class Order:
    """The infinite global order of rows: `order[g]` reads the row of position g.

    With `on_damage`, a row that cannot be read is told to it and replaced by its stand-in, which has "replaced" set.
    """

    sources: tuple[RowSource, ...]
    places: grain.MapDataset
    on_damage: OnDamage | None = None

    def place(self, position: int) -> tuple[int, int]:
        """The (source, row) of a position, without reading it."""
        place = self.places[position]
        assert place is not None  # grain's way to filter, not used here
        return place

    def __getitem__(self, position: int) -> dict[str, Any]:
        number, row = self.place(position)
        source = self.sources[number]
        try:
            return source[row]
        except DamagedRow as error:
            if self.on_damage is None:
                raise InputError(f"{error}, or set config.data.on_damage to 'skip'") from error
            other = source.stand_in(row)
            self.on_damage(position, str(error), f"row {other} of the dataset stands in for row {row}")
            return source[other] | {"replaced": True}


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
    if not sources or len(weights) != len(sources) or min(weights) <= 0:
        raise InputError(f"weights are {weights} for {len(sources)} datasets; each needs one above 0")
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
    random_length_fraction: float = 0.0,
    split_fraction: float = 0.0,
    threads: int = 4,
    prefetch: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of steps start_step, …, num_steps - 1; row j of step s is order[s * batch_size + j].

    Each is a dict of the rows that `only` names (those of this process; None: all): tokens and
    segment_ids int32 [B, L] (segment 0 is padding), maskable bool [B, L], answer_length int32 [B]
    (how many positions are maskable); where damaged rows are replaced, which ones were: replaced bool [B]. No other
    rows are read.
    "text": everything but padding is maskable; `random_length_fraction` and `split_fraction` apply.
    "chat": the reply is maskable, and so is the EOS that pads it to the longest dialogue of the
    *global* batch; text rows may be mixed in. `prefetch` batches are made ahead by `threads`.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if kind == "chat" and (random_length_fraction or split_fraction):
        raise InputError("random_length_fraction and split_fraction are for kind 'text'; leave them 0 for 'chat'")
    make = functools.partial(
        _make_batch,
        order=order,
        batch_size=batch_size,
        only=range(batch_size) if only is None else only,
        kind=kind,
        seed=seed,
        eos_id=eos_id,
        fractions=(random_length_fraction, split_fraction),
    )
    steps = grain.MapDataset.range(start_step, max(num_steps, start_step))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(steps.map(make).to_iter_dataset(options))


def _make_batch(
    step: int,
    *,
    order: Order,
    batch_size: int,
    only: Sequence[int] | np.ndarray,
    kind: str,
    seed: int,
    eos_id: int,
    fractions: tuple[float, float],
) -> dict[str, np.ndarray]:
    positions_G = range(step * batch_size, (step + 1) * batch_size)
    positions_B = np.asarray([positions_G[row] for row in only])
    read = [order[int(g)] for g in positions_B]
    replaced = {} if order.on_damage is None else {"replaced": np.asarray(["replaced" in row for row in read])}
    tokens_BL = np.stack([row["tokens"] for row in read])
    segment_ids_BL = np.stack([row["segment_ids"] for row in read])
    if kind == "chat":
        longest = _longest_dialogue(order, positions_G)
        prompts_B = np.asarray([row["prompt_length"] for row in read], np.int32)
        return _pad_answers(tokens_BL, segment_ids_BL, prompts_B, longest, eos_id) | replaced
    random_fraction, split_fraction = fractions
    if random_fraction:
        tokens_BL, segment_ids_BL = packing.random_length(
            tokens_BL,
            segment_ids_BL,
            positions_B,
            fraction=random_fraction,
            seed=seed,
            pad_id=eos_id,
        )
    if split_fraction:
        segment_ids_BL = packing.split_in_two(segment_ids_BL, positions_B, fraction=split_fraction, seed=seed)
    return _batch(tokens_BL, segment_ids_BL, segment_ids_BL > 0) | replaced


def _longest_dialogue(order: Order, positions_G: range) -> int:
    """Length of the longest chat row of the global batch, which every process finds by itself."""
    longest = 0
    for source, row in map(order.place, positions_G):
        if order.sources[source].kind == "chat":
            longest = max(longest, int(order.sources[source].lengths[row]))
    return longest


def _pad_answers(
    tokens_BL: np.ndarray,
    segment_ids_BL: np.ndarray,
    prompts_B: np.ndarray,
    longest: int,
    eos_id: int,
) -> dict[str, np.ndarray]:
    """EOS up to `longest` becomes part of the reply (LLaDA's SFT): maskable and attended."""
    is_chat_B1 = (prompts_B > 0)[:, None]  # a text row has no prompt
    columns_L = np.arange(tokens_BL.shape[1])
    filler_BL = is_chat_B1 & (segment_ids_BL == 0) & (columns_L < longest)
    tokens_BL = np.where(filler_BL, eos_id, tokens_BL)
    segment_ids_BL = np.where(filler_BL, 1, segment_ids_BL)
    return _batch(tokens_BL, segment_ids_BL, (segment_ids_BL > 0) & (columns_L >= prompts_B[:, None]))


def _batch(tokens_BL: np.ndarray, segment_ids_BL: np.ndarray, maskable_BL: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "tokens": tokens_BL.astype(np.int32, copy=False),
        "segment_ids": segment_ids_BL.astype(np.int32, copy=False),
        "maskable": maskable_BL,
        "answer_length": maskable_BL.sum(1, dtype=np.int32),
    }
