"""Many pairs of prompt and answer, of any lengths, scored by a few compiled programs.

R rows of a batch, S columns, P prompt length, A answer length, W columns that are scored, U masks of one pair.

A row ends with the last column: padding, prompt, answer. Positions count from its first token and nothing sees the
padding, so the batch that a row lies in changes its scores by rounding alone. S, W and R come in few sizes.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from llada_jax import inputs
from llada_jax.fields import InputError
from llada_jax.model.masks import Mask
from llada_jax.objectives.cross_entropy import scored_cross_entropy
from llada_jax.parallel.mesh import BATCH, HIDDEN, TOKENS, current_mesh, reshard

_TOKENS_AT_ONCE = 2**14  # of a batch and device: a forward pass over so many keeps an accelerator busy
_AHEAD = 2  # batches that are under way while the host makes the next


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Prompt and answer as one row, int32 [P + A], and where the answer starts."""

    tokens: np.ndarray
    start: int

    @property
    def length(self) -> int:
        """Of the answer."""
        return len(self.tokens) - self.start

    @property
    def question(self) -> bytes:
        """The prompt, from which random numbers are drawn."""
        return self.tokens[: self.start].tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one program."""

    tokens: np.ndarray  # int32 [R, S]
    first: np.ndarray  # int32 [R], the row's first column
    length: np.ndarray  # int32 [R], A
    masked: np.ndarray  # bool [R, W]
    places: np.ndarray  # int [R or fewer, 2], of the rows that are asked: job, mask of it


def make_pair(c, prompt, answer) -> Pair:
    """Raises InputError for what does not fit the model. The prompt may be empty."""
    parts = [
        inputs.token_ids(name, ids, c.embedding_size, "[tokens]") if name == "answer" or np.size(ids)
        else np.zeros(0, np.int32) for name, ids in (("prompt", prompt), ("answer", answer))
    ]  # fmt: skip
    if sum(map(len, parts)) > c.max_sequence_length:
        raise InputError(
            f"prompt ({len(parts[0])}) and answer ({len(parts[1])}) exceed the model's context of "
            f"{c.max_sequence_length} tokens"
        )
    return Pair(np.concatenate(parts), len(parts[0]))


def cross_entropies(
    model, jobs: Sequence[tuple[Pair, np.ndarray]], *, cfg_scale: float = 0.0, rows_at_once: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a job, -log p of each masked token given what is not masked), float64 [U, A], nats; 0 elsewhere.

    jobs: a pair and its masks, bool [U, A]; each is handed over when all its rows are scored, the longest first.
    rows_at_once: of a batch and device; None: as many as make 2^14 tokens. cfg_scale: classifier-free guidance, Eq. 16
    of arXiv 2502.09992. Raises InputError where a score is not finite or a batch does not fit into memory.
    """
    scale = inputs.not_negative("cfg_scale", cfg_scale)
    program = functools.partial(_score, model, scale=jnp.float32(scale), guided=scale > 0)
    left = [len(masks) for _, masks in jobs]
    found: dict[int, np.ndarray] = {}  # of the jobs that are under way
    for batch, ce_RW in _run(program, batches(jobs, rows_at_once)):
        for row, (job, mask) in enumerate(batch.places.tolist()):
            pair, masks = jobs[job]
            found.setdefault(job, np.zeros(masks.shape))[mask] = ce_RW[row, ce_RW.shape[1] - pair.length :]
            left[job] -= 1
            if not left[job]:
                yield job, _finite(found.pop(job))


def confidence_orders(
    model, pairs: Sequence[Pair], *, cfg_scale: float = 0.0, rows_at_once: int | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of a pair, the step at which each token of its answer was revealed int [A], its log p then float64 [A]).

    The answer starts masked; each step reveals the true token of which the model is surest.
    """
    scale = inputs.not_negative("cfg_scale", cfg_scale)
    program = functools.partial(_reveal, model, scale=jnp.float32(scale), guided=scale > 0)
    jobs = [(pair, np.ones((1, pair.length), bool)) for pair in pairs]
    for batch, found_2RW in _run(program, batches(jobs, rows_at_once)):
        for row, (job, _) in enumerate(batch.places.tolist()):
            step_A, ce_A = found_2RW[:, row, found_2RW.shape[2] - pairs[job].length :]
            yield job, step_A.astype(int), -_finite(ce_A)


def batches(jobs: Sequence[tuple[Pair, np.ndarray]], rows_at_once: int | None = None) -> Iterator[Batch]:
    """The rows of all jobs in batches of equal width, the longest first; the last of a width is filled up."""
    split, context = _splits()
    groups = collections.defaultdict(list)
    for number, (pair, masks) in enumerate(jobs):
        S = _width(len(pair.tokens), context)
        W = -(-min(max(8, _power_of_two(pair.length)), S) // context) * context
        groups[S, W].append((number, len(masks)))
    for (S, W), group in sorted(groups.items(), reverse=True):
        places = np.concatenate([np.stack([np.full(count, job), np.arange(count)], axis=1) for job, count in group])
        rows = _rows(len(places), rows_at_once or max(_TOKENS_AT_ONCE // S, 1), split)
        for start in range(0, len(places), rows):
            yield _batch(jobs, places[start : start + rows], rows, S, W)


def _batch(jobs, places: np.ndarray, rows: int, S: int, W: int) -> Batch:
    batch = Batch(
        np.zeros((rows, S), np.int32), np.zeros(rows, np.int32), np.ones(rows, np.int32), np.zeros((rows, W), bool),
        places,
    )  # fmt: skip
    for row, (job, mask) in enumerate(places.tolist()):
        pair, masks = jobs[job]
        batch.first[row], batch.length[row] = S - len(pair.tokens), pair.length
        batch.tokens[row, S - len(pair.tokens) :] = pair.tokens
        batch.masked[row, W - pair.length :] = masks[mask]
    return batch


def _rows(asked: int, most: int, split: int) -> int:
    """Rows of each batch: a power of two where one batch holds all that are asked, else few sizes below `most`."""
    most = max(_power_of_two(most + 1) // 2, 1) * split
    if asked <= most:
        return -(-_power_of_two(asked) // split) * split
    share = -(-asked // -(-asked // most))
    grain = max(most // 8, split)
    return -(-share // grain) * grain


def _width(columns: int, parts: int) -> int:
    """Few widths, four to a doubling, which are multiples of `parts`."""
    grain = int(np.lcm(max(16, _power_of_two(columns) // 8), parts))
    return -(-columns // grain) * grain


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _run(program, given: Iterator[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with what the program makes of it; some are under way at a time."""
    waiting = collections.deque()
    for batch in given:
        waiting.append((batch, _submit(program, batch)))
        if len(waiting) > _AHEAD:
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _submit(program, batch: Batch) -> jax.Array:
    mesh = current_mesh()
    place = jnp.asarray if mesh is None else lambda x: jax.device_put(x, P(BATCH, *[None] * (x.ndim - 1)))
    with _memory(batch):
        return program(*(place(x) for x in (batch.tokens, batch.first, batch.length, batch.masked)))


def _fetched(batch: Batch, scores: jax.Array) -> tuple[Batch, np.ndarray]:
    with _memory(batch):
        scores = scores if current_mesh() is None else multihost_utils.process_allgather(scores, tiled=True)
        return batch, np.asarray(scores)


@contextlib.contextmanager
def _memory(batch: Batch) -> Iterator[None]:
    """Turns the devices' lack of memory into one line."""
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        rows, columns = batch.tokens.shape
        raise InputError(
            f"a batch of {rows} rows of {columns} tokens does not fit into the devices' memory; score fewer at once"
        ) from error


def _finite(ce: np.ndarray) -> np.ndarray:
    if not np.isfinite(ce).all():
        raise InputError("the model's scores are not finite: its weights hold NaN or overflow; use another checkpoint")
    return ce.astype(np.float64)


@functools.partial(jax.jit, static_argnames="guided")
def _score(model, tokens_RS, first_R, length_R, masked_RW, *, scale, guided: bool) -> jax.Array:
    """The cross-entropy of each masked token, float32 [R, W]."""
    return _masked_cross_entropy(model, tokens_RS, first_R, length_R, masked_RW, scale, guided)


@functools.partial(jax.jit, static_argnames="guided")
def _reveal(model, tokens_RS, first_R, length_R, masked_RW, *, scale, guided: bool) -> jax.Array:
    """The step at which each masked token is revealed, and its cross-entropy then, float32 [2, R, W]."""

    def step(i, carry):
        masked_RW, step_RW, found_RW = carry
        ce_RW = _masked_cross_entropy(model, tokens_RS, first_R, length_R, masked_RW, scale, guided)
        ce_RW = reshard(ce_RW, BATCH, None)
        surest_R1 = jnp.argmin(jnp.where(masked_RW, ce_RW, jnp.inf), axis=1)[:, None]
        now_RW = masked_RW & (jnp.arange(masked_RW.shape[1]) == surest_R1)
        return masked_RW & ~now_RW, jnp.where(now_RW, i, step_RW), jnp.where(now_RW, ce_RW, found_RW)

    zeros_RW = jnp.zeros_like(masked_RW, jnp.float32)
    start = (masked_RW, zeros_RW.astype(jnp.int32), zeros_RW)
    _, step_RW, found_RW = jax.lax.fori_loop(0, jnp.max(length_R), step, start)
    return jnp.stack([step_RW.astype(jnp.float32), found_RW])


def _masked_cross_entropy(model, tokens_RS, first_R, length_R, masked_RW, scale, guided: bool) -> jax.Array:
    S, W = tokens_RS.shape[1], masked_RW.shape[1]
    mask_id, columns_S = model.config.mask_token_id, jnp.arange(S)
    real_RS = columns_S >= first_R[:, None]
    mask = Mask(segment_ids=reshard(real_RS.astype(jnp.int32), *TOKENS))
    positions_RS = reshard(jnp.maximum(columns_S - first_R[:, None], 0), *TOKENS)
    masked_RS = jnp.pad(masked_RW, ((0, 0), (S - W, 0)))
    rows_RS = jnp.where(masked_RS, mask_id, tokens_RS)
    # Guidance is linear in the logits, and they in the hidden states: one product with the vocabulary serves both.
    hidden_RSD = model.hidden(rows_RS, mask, positions_RS)
    if guided:
        in_prompt_RS = columns_S < S - length_R[:, None]
        without = model.hidden(jnp.where(in_prompt_RS, mask_id, rows_RS), mask, positions_RS).astype(jnp.float32)
        hidden_RSD = (without + (scale + 1) * (hidden_RSD - without)).astype(hidden_RSD.dtype)
    hidden_RWD = reshard(reshard(hidden_RSD, BATCH, None, None)[:, S - W :], *HIDDEN)
    asked_RW = reshard(masked_RW.astype(jnp.float32), *TOKENS)
    targets_RW = reshard(tokens_RS[:, S - W :], *TOKENS)
    scored: Any = scored_cross_entropy  # custom_vjp hides its result's type
    return scored(hidden_RWD, model.head[...].astype(hidden_RWD.dtype), targets_RW, asked_RW)[1]


def _splits() -> tuple[int, int]:
    """Over how many devices the mesh splits rows, and the positions of a row."""
    mesh = current_mesh()
    return (1, 1) if mesh is None else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"])
