"""What to put at a masked position, how sure the model is of it, and which positions to commit.

B rows, W columns of a block, V vocabulary.

Every row and column draws with a key of its own, so that what a row gets depends neither on how many rows are sampled
beside it nor on how wide the window is. (Drawn at once for a whole [B, W, V], high-range Gumbel noise does: its low
bits come from a second half of the draw, which begins where the rows end.)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llada_jax.parallel.mesh import BATCH, reshard

_LAST = -1e30  # score of what may be committed, but only when nothing else is left

REMASKING = ("low_confidence", "margin", "entropy", "random")  # what ranks the positions: the surest are committed


class Candidates(NamedTuple):
    """What a commit rule decides on: the predictions of one step. Columns are in one order everywhere."""

    score_BW: jax.Array  # float32; how sure, in any scale: only its order counts
    value_BW: jax.Array  # float32; the same as a number in [0, 1] (a probability, a margin), or an entropy in nats
    open_BW: jax.Array  # bool; may be committed
    count_B: jax.Array  # int32; the quota of this step
    limit: jax.Array  # float32 []; the rule's parameter


def commit_quota(c: Candidates) -> jax.Array:
    """The `count` surest (Algorithm 5 of arXiv 2502.09992)."""
    return commit_top_k(c.score_BW, c.open_BW, c.count_B)


def commit_above_threshold(c: Candidates) -> jax.Array:
    """All whose confidence is at least the threshold (Fast-dLLM, arXiv 2505.22618, Algorithm 2)."""
    return c.open_BW & (c.value_BW >= c.limit)


def commit_by_factor(c: Candidates) -> jax.Array:
    """The j surest, as long as (j + 1)(1 - p_j) <= factor for each of them (Fast-dLLM, section 3.3).

    As in its code, the last open position goes with the others if it is the first that fails.
    """
    rank_BW = _ranks(c.score_BW, c.open_BW)
    fails_BW = c.open_BW & (c.value_BW < 1 - c.limit / (rank_BW + 2)) & (rank_BW > 0)
    first_B = jnp.min(jnp.where(fails_BW, rank_BW, rank_BW.shape[1]), axis=1)
    open_B = jnp.sum(c.open_BW, axis=1)
    return c.open_BW & (rank_BW < jnp.where(first_B == open_B - 1, open_B, first_B)[:, None])


def commit_within_entropy(c: Candidates) -> jax.Array:
    """The surest, while the entropies of those before them sum to at most the bound, nats (arXiv 2505.24857, Eq. 5)."""
    order_BW = _order(c.score_BW, c.open_BW)
    entropy_BW = jnp.take_along_axis(jnp.where(c.open_BW, c.value_BW, 0.0), order_BW, axis=1)
    within_BW = jnp.cumsum(entropy_BW, axis=1) - jax.lax.cummax(entropy_BW, axis=1) <= c.limit
    count_B = jnp.sum(jnp.cumprod(within_BW.astype(jnp.int32), axis=1), axis=1)
    return c.open_BW & (_ranks(c.score_BW, c.open_BW) < count_B[:, None])


# A rule says which of the open positions to commit at a step. In each row with an open position the surest is committed
# besides, so that every step makes progress, but for "quota", which may have steps to spare.
RULES: dict[str, Callable[[Candidates], jax.Array]] = {
    "quota": commit_quota,
    "threshold": commit_above_threshold,
    "factor": commit_by_factor,
    "entropy_bound": commit_within_entropy,
}


def commit(rule: str, candidates: Candidates) -> jax.Array:
    """The positions that are committed at a step, bool [B, W]."""
    chosen_BW = RULES[rule](candidates)
    if rule == "quota":
        return chosen_BW
    one_B = jnp.ones(len(chosen_BW), jnp.int32)
    return chosen_BW | commit_top_k(candidates.score_BW, candidates.open_BW, one_B)


def sample_tokens(
    key: jax.Array, logits_BWV: jax.Array, temperature: jax.Array | float, rows_B: jax.Array | None = None,
    columns_W: jax.Array | None = None, noise_BWV: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The predicted token, int32 [B, W]: argmax of logits + temperature · Gumbel noise.

    rows, columns: their numbers, by which noise is drawn; 0..B-1 and 0..W-1 by default. noise: Gumbel noise to take
    instead of drawing it. At temperature 0 nothing is drawn.
    """
    B, W, V = logits_BWV.shape
    rows_B = jnp.arange(B) if rows_B is None else rows_B
    columns_W = jnp.arange(W) if columns_W is None else columns_W

    def noisy(key):
        noise = _gumbel(_keys(key, rows_B, columns_W), V) if noise_BWV is None else noise_BWV
        return _argmax(logits_BWV + temperature * noise)

    greedy = lambda key: _argmax(logits_BWV)
    return jax.lax.cond(temperature > 0, noisy, greedy, key)


def _argmax(x_BWV: jax.Array) -> jax.Array:
    """The first of the largest, int32 [B, W]; of NaNs the last. Two reductions: on CPUs XLA's argmax is scalar."""
    V = x_BWV.shape[-1]
    is_top_BWV = x_BWV == jnp.max(x_BWV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_top_BWV, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def _gumbel(keys_BW: jax.Array, V: int) -> jax.Array:
    """In high-range mode: ordinary float32 noise ends at 15.9 and could never choose a token far below the best one
    (arXiv 2409.02908 on why low precision harms samples)."""
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32, mode="high")))(keys_BW)


def random_score(key: jax.Array, rows_B: jax.Array, columns_W: jax.Array) -> jax.Array:
    """Uniform draws, float32 [B, W]: the confidence of remasking="random"."""
    return jax.vmap(jax.vmap(jax.random.uniform))(_keys(key, rows_B, columns_W))


def _keys(key: jax.Array, rows_B: jax.Array, columns_W: jax.Array) -> jax.Array:
    """One key for each row and column, [B, W]; made everywhere, then split, as jax 0.10 can't lower `fold_in` of split
    rows on a mesh of one device."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, reshard(rows_B))
    return reshard(jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, columns_W), BATCH)


def confidence(logits_BWV: jax.Array, tokens_BW: jax.Array) -> jax.Array:
    """Log-odds of each chosen token against all others, float32 [B, W]; its probability is the sigmoid of it.

    Odds, not probabilities: those round to 1 from a logit gap of 17 on and tie.
    """
    chosen_BWV = jnp.arange(logits_BWV.shape[-1]) == tokens_BW[..., None]
    own_BW = jnp.sum(jnp.where(chosen_BWV, logits_BWV, 0.0), axis=-1)
    others_BW = jax.nn.logsumexp(jnp.where(chosen_BWV, -jnp.inf, logits_BWV), axis=-1)
    return jnp.maximum(own_BW - others_BW, _LAST)


def margin(logits_BWV: jax.Array) -> jax.Array:
    """Probability of the best token less that of the second best, float32 [B, W]."""
    top_BW2 = jax.lax.top_k(logits_BWV, 2)[0]
    p_BW2 = jnp.exp(top_BW2 - jax.nn.logsumexp(logits_BWV, axis=-1, keepdims=True))
    return p_BW2[..., 0] - p_BW2[..., 1]


def entropy(logits_BWV: jax.Array) -> jax.Array:
    """Of the predicted distribution, nats, float32 [B, W]."""
    log_p_BWV = jax.nn.log_softmax(logits_BWV, axis=-1)
    return -jnp.sum(jnp.where(jnp.isfinite(log_p_BWV), jnp.exp(log_p_BWV) * log_p_BWV, 0.0), axis=-1)


def without(logits_BWV: jax.Array, *ids: jax.Array | int) -> jax.Array:
    """The logits with those of some tokens at -inf; a negative id is none."""
    for token in ids:
        logits_BWV = jnp.where(jnp.arange(logits_BWV.shape[-1]) == token, -jnp.inf, logits_BWV)
    return logits_BWV


def tokens_per_step(masks_B: jax.Array, steps: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """How many of a block's masks to commit at a step: spread evenly, the remainder on the first steps."""
    return masks_B // steps + (step < masks_B % steps)


def commit_top_k(score_BW: jax.Array, open_BW: jax.Array, count_B: jax.Array) -> jax.Array:
    """The `count` open positions of the highest score in each row, bool [B, W]; ties go to the left."""
    return open_BW & (_ranks(score_BW, open_BW) < count_B[:, None])


def _order(score_BW: jax.Array, open_BW: jax.Array) -> jax.Array:
    """Columns by falling score, NaN behind all others, those that are not open last."""
    score_BW = jnp.where(jnp.isnan(score_BW), jnp.finfo(jnp.float32).min, score_BW)
    return jnp.argsort(jnp.where(open_BW, -score_BW, jnp.inf), axis=-1, stable=True)


def _ranks(score_BW: jax.Array, open_BW: jax.Array) -> jax.Array:
    """The place of each column in that order, from 0."""
    return jnp.argsort(_order(score_BW, open_BW), axis=-1)
