"""How likely a model finds an answer to a prompt: LLaDA's Monte Carlo bound, and the exact numbers for short answers.

N masks, R rows of a mini-batch, P prompt length, A answer length, S = P + A, W columns that are scored.

For a masked set M of the answer, CE_M is the sum of -log p(x_i | prompt, what is not masked) over M. The bound is
-E[A / |M| · CE_M] with |M| uniform in 1..A and M uniform among the sets of its size (Eq. 6 of arXiv 2502.09992). It is
also what the training objective integrates to over t, and the mean over all orders of the log-likelihood by the chain
rule in that order.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from llada_jax import inputs
from llada_jax.fields import InputError
from llada_jax.objectives.cross_entropy import scored_cross_entropy
from llada_jax.parallel.mesh import BATCH, HIDDEN, current_mesh, reshard

_ROWS = 16  # of a mini-batch, where the caller has no say
_MOST_ENUMERATED = 16  # tokens of an answer whose 2^A masks are enumerated


def log_likelihood(
    model, prompt, answer, *, mc_num: int = 128, batch_size: int = 16, cfg_scale: float = 0.0,
    key: jax.Array | None = None,
) -> float:  # fmt: skip
    """Monte Carlo lower bound of log p(answer | prompt), nats; unbiased for the bound (Eq. 6 of arXiv 2502.09992).

    prompt, answer: token ids, int [P] and [A]. mc_num // batch_size mini-batches are drawn, in each of which the
    numbers of masked tokens are spread evenly over 1..A; a remainder of mc_num is dropped, as in the official code.
    cfg_scale: classifier-free guidance, Eq. 16. Raises InputError for what does not fit the model.
    """
    tokens, start = _tokens(model.config, prompt, answer)
    mc_num, batch_size = inputs.whole("mc_num", mc_num), inputs.whole("batch_size", batch_size)
    if not 1 <= batch_size <= mc_num:
        raise InputError(f"mc_num {mc_num} and batch_size {batch_size}: need 1 <= batch_size <= mc_num")
    if mc_num % batch_size:
        text = "mc_num %d is not a multiple of batch_size %d: %d samples are dropped"
        logging.log_first_n(logging.WARNING, text, 1, mc_num, batch_size, mc_num % batch_size)
    masked_NA, ratio_N = fixed_count_masks(
        inputs.random_key(key), mc_num // batch_size, batch_size, len(tokens) - start
    )
    ce_NA = _cross_entropies(model, tokens, start, masked_NA, cfg_scale, batch_size)
    return float(-np.mean(ce_NA.sum(axis=1) / ratio_N))


def log_likelihood_from_masks(model, prompt, answer, masked, mask_ratio, cfg_scale: float = 0.0) -> np.ndarray:
    """-Σ over masked of CE / mask_ratio for each mask, float64 [N], nats.

    masked: bool [N, A], or [N, P + A] with nothing of the prompt masked. mask_ratio: float [N] or of masked's shape, in
    (0, 1] where something is masked. Raises InputError for what does not fit.
    """
    tokens, start = _tokens(model.config, prompt, answer)
    masked = inputs.zeros_and_ones("masked", masked)
    ratio = np.asarray(inputs.array("mask_ratio", mask_ratio, "iuf"), np.float64)
    shapes = [(len(masked), len(tokens) - start), (len(masked), len(tokens))] if masked.ndim == 2 else []
    if masked.shape not in shapes or len(masked) == 0:
        raise InputError(
            f"masked has shape {masked.shape}; it must be [masks, {len(tokens) - start}] or [masks, {len(tokens)}]"
        )
    if ratio.ndim not in (1, 2) or ratio.shape not in (*shapes, masked.shape[:1]):
        raise InputError(f"mask_ratio has shape {ratio.shape}; it must be {masked.shape[:1]} or {masked.shape}")
    ratio = ratio[:, None] if ratio.ndim == 1 else ratio[:, start - len(tokens) :]
    if masked.shape[1] == len(tokens):
        if masked[:, :start].any():
            raise InputError("masked covers tokens of the prompt; only those of the answer may be masked")
        masked = masked[:, start:]
    inputs.ratios(masked, ratio)
    ce_NA = _cross_entropies(model, tokens, start, masked, cfg_scale)
    return -np.sum(ce_NA / np.where(masked, ratio, 1.0), axis=1)


def any_order_log_likelihood(model, prompt, answer, *, cfg_scale: float = 0.0) -> tuple[float, float]:
    """Over all A! orders of generation, the mean of log p(answer | prompt, order), and log of the mean of p; nats.

    The first is the exact value of what `log_likelihood` estimates and training bounds with. The second is the log-
    likelihood of the text that one gets by drawing an order and then token after token in it. By Jensen's inequality
    the first is never larger; they are equal when the order makes no difference. Costs 2^A forward passes: raises
    InputError for answers of more than 16 tokens.
    """
    tokens, start = _tokens(model.config, prompt, answer)
    A = len(tokens) - start
    if A > _MOST_ENUMERATED:
        raise InputError(f"an answer of {A} tokens has 2^{A} masks; at most {_MOST_ENUMERATED} tokens are enumerated")
    masked_NA = (np.arange(2**A)[:, None] >> np.arange(A)) & 1 == 1  # mask n masks the bits of n
    ce_NA = _cross_entropies(model, tokens, start, masked_NA, cfg_scale)
    bound, log_p = np.zeros(2**A), np.zeros(2**A)  # of what mask n leaves to be said, from nothing upwards
    for n in range(1, 2**A):
        bits = np.flatnonzero(masked_NA[n])
        rest = n ^ (1 << bits)  # after one more token, each of them equally often the next
        bound[n] = np.mean(bound[rest] - ce_NA[n, bits])
        log_p[n] = np.logaddexp.reduce(log_p[rest] - ce_NA[n, bits]) - math.log(len(bits))
    return float(bound[-1]), float(log_p[-1])


def fixed_count_masks(key: jax.Array, batches: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [batches · rows, length] with numbers of masked tokens spread over each mini-batch, and their ratios.

    With k ~ U{1..A}, row j of R masks x_j = (k + round(j·A/R) - 1) mod A + 1 tokens: the x_j of the official code, save
    that halves are rounded up. There they are rounded to even after adding k, so that a row with a half meets only
    every other number, some of them twice, and its estimate is biased.
    """
    count_key, order_key = jax.random.split(key)
    k_B = np.asarray(jax.random.randint(count_key, (batches,), 1, length + 1))
    count_N = stratified_counts(k_B, rows, length).reshape(-1)
    draws_NA = np.asarray(jax.random.uniform(order_key, (batches * rows, length)))
    rank_NA = np.argsort(np.argsort(draws_NA, axis=1, kind="stable"), axis=1)
    return rank_NA < count_N[:, None], count_N / length


def stratified_counts(k_B: np.ndarray, rows: int, length: int) -> np.ndarray:
    """How many tokens each row of each mini-batch masks, int [batches, rows], for k drawn from 1..length."""
    offset_R = (2 * np.arange(rows) * length + rows) // (2 * rows)
    return (np.asarray(k_B)[:, None] + offset_R - 1) % length + 1


def _tokens(c, prompt, answer) -> tuple[np.ndarray, int]:
    """The two as one row int32 [S], and where the answer starts."""
    given = dict(prompt=prompt, answer=answer)
    parts = [inputs.token_ids(name, ids, c.embedding_size, "[tokens]") for name, ids in given.items()]
    if sum(map(len, parts)) > c.max_sequence_length:
        raise InputError(
            f"prompt ({len(parts[0])}) and answer ({len(parts[1])}) exceed the model's context of "
            f"{c.max_sequence_length} tokens"
        )
    return np.concatenate(parts), len(parts[0])


def _cross_entropies(
    model, tokens_S: np.ndarray, start: int, masked_NA: np.ndarray, cfg_scale: float, rows: int = _ROWS
) -> np.ndarray:
    """-log p of each masked token of the answer given what is not masked, float64 [N, A], nats; 0 where not masked."""
    cfg_scale = inputs.not_negative("cfg_scale", cfg_scale)
    mesh, N = current_mesh(), len(masked_NA)
    split, context = _splits()
    if len(tokens_S) % context:
        raise InputError(f"{len(tokens_S)} tokens do not split over {context} devices of config.mesh.context")
    rows = -(-min(rows, N) // split) * split
    masked_NS = np.zeros((-(-N // rows) * rows, len(tokens_S)), bool)  # filled up with rows that ask nothing
    masked_NS[:N, start:] = masked_NA
    masked_TRS = masked_NS.reshape(-1, rows, len(tokens_S))
    place = jnp.asarray if mesh is None else lambda x: jax.device_put(x, P(None, BATCH, None))
    scale = jnp.float32(cfg_scale)
    ce_TRW = _score(model, jnp.asarray(tokens_S), place(masked_TRS), scale, start=start, guided=cfg_scale > 0)
    ce_TRW = ce_TRW if mesh is None else multihost_utils.process_allgather(ce_TRW, tiled=True)
    return np.asarray(ce_TRW, np.float64).reshape(len(masked_NS), -1)[:N, start - len(tokens_S) :]


@functools.partial(jax.jit, static_argnames=("start", "guided"))
def _score(model, tokens_S: jax.Array, masked_TRS: jax.Array, scale, *, start: int, guided: bool) -> jax.Array:
    """The cross-entropy of each masked token, float32 [T, R, W], one mini-batch after the other.

    W columns at the end: the answer, and as much before it as lets them split over `context`.
    """
    S = len(tokens_S)
    _, context = _splits()
    W = -(-(S - start) // context) * context
    in_prompt_S = jnp.arange(S) < start

    def mini_batch(masked_RS):
        rows_RS = jnp.where(masked_RS, model.config.mask_token_id, tokens_S)
        # Guidance is linear in the logits, and they in the hidden states: one product with the vocabulary serves both.
        hidden_RSD = model.hidden(rows_RS)
        if guided:
            without = model.hidden(jnp.where(in_prompt_S, model.config.mask_token_id, rows_RS)).astype(jnp.float32)
            hidden_RSD = (without + (scale + 1) * (hidden_RSD - without)).astype(hidden_RSD.dtype)
        hidden_RWD = reshard(reshard(hidden_RSD, BATCH, None, None)[:, S - W :], *HIDDEN)
        asked_RW = reshard(masked_RS[:, S - W :].astype(jnp.float32), BATCH, "context")
        target_RW = reshard(jnp.broadcast_to(tokens_S[S - W :], asked_RW.shape), BATCH, "context")
        head_VD = model.head[...].astype(hidden_RWD.dtype)
        scored: Any = scored_cross_entropy  # custom_vjp hides its result's type
        return scored(hidden_RWD, head_VD, target_RW, asked_RW)[1]

    return jax.lax.map(mini_batch, masked_TRS)


def _splits() -> tuple[int, int]:
    """Over how many devices the mesh splits rows, and the positions of a row."""
    mesh = current_mesh()
    return (1, 1) if mesh is None else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"])
