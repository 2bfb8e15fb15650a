"""What to put at a masked position, how sure the model is of it, and which positions to commit.

B rows, W columns of a window, V vocabulary.

Every row and column draws with a key of its own, so that what a row gets depends neither on how many rows are sampled
beside it nor on how wide the window is. (Drawn at once for a whole [B, W, V], high-range Gumbel noise does: its low
bits come from a second half of the draw, which begins where the rows end.)
"""

import jax
import jax.numpy as jnp

from llada_jax.parallel.mesh import BATCH, reshard

_LAST = -1e30  # score of what may be committed, but only when nothing else is left


def sample_tokens(
    key: jax.Array, logits_BWV: jax.Array, temperature: float, mask_id: int,
    columns_W: jax.Array | None = None, noise_BWV: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The predicted token, int32 [B, W]: argmax of logits + temperature · Gumbel noise. MASK is never predicted.

    columns: numbers of the window's columns, 0..W-1 by default. noise: Gumbel noise to take instead of drawing it.
    """
    logits_BWV = _without(logits_BWV, (mask_id,))
    if temperature > 0:
        logits_BWV += temperature * (_gumbel(key, logits_BWV.shape, columns_W) if noise_BWV is None else noise_BWV)
    return jnp.argmax(logits_BWV, axis=-1).astype(jnp.int32)


def _gumbel(key: jax.Array, shape: tuple[int, ...], columns_W: jax.Array | None) -> jax.Array:
    """In high-range mode: ordinary float32 noise ends at 15.9 and could never choose a token far below the best one
    (arXiv 2409.02908 on why low precision harms samples)."""
    B, W, V = shape
    draw = lambda key: jax.random.gumbel(key, (V,), jnp.float32, mode="high")
    return jax.vmap(jax.vmap(draw))(_keys(key, B, jnp.arange(W) if columns_W is None else columns_W))


def random_score(key: jax.Array, rows: int, columns_W: jax.Array) -> jax.Array:
    """Uniform draws, float32 [B, W]: the confidence of remasking="random"."""
    return jax.vmap(jax.vmap(jax.random.uniform))(_keys(key, rows, columns_W))


def _keys(key: jax.Array, rows: int, columns_W: jax.Array) -> jax.Array:
    """One key for each row and column, [B, W]."""
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, reshard(jnp.arange(rows), BATCH))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, columns_W)


def confidence(logits_BWV: jax.Array, tokens_BW: jax.Array, last_ids: tuple[int, ...] = ()) -> jax.Array:
    """Log-odds of each chosen token against all others, float32 [B, W]; its probability is the sigmoid of it.

    Odds, not probabilities: those round to 1 from a logit gap of 17 on and tie. Tokens in `last_ids` leave the
    normalisation and score below everything else (`confidence_eos_eot_inf` of the official sampler, for every
    temperature).
    """
    logits_BWV = _without(logits_BWV, last_ids)
    chosen_BWV = jnp.arange(logits_BWV.shape[-1]) == tokens_BW[..., None]
    own_BW = jnp.sum(jnp.where(chosen_BWV, logits_BWV, 0.0), axis=-1)
    others_BW = jax.nn.logsumexp(jnp.where(chosen_BWV, -jnp.inf, logits_BWV), axis=-1)
    return jnp.maximum(own_BW - others_BW, _LAST)


def tokens_per_step(masks_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """How many of a block's masks to commit at a step: spread evenly, the remainder on the first steps."""
    return masks_B // steps + (step < masks_B % steps)


def commit_top_k(score_BW: jax.Array, open_BW: jax.Array, count_B: jax.Array) -> jax.Array:
    """The `count` open positions of the highest score in each row, bool [B, W]; ties go to the left."""
    order_BW = jnp.argsort(jnp.where(open_BW, -score_BW, jnp.inf), axis=-1, stable=True)
    rank_BW = jnp.argsort(order_BW, axis=-1)
    return open_BW & (rank_BW < count_B[:, None])


def _without(logits_BWV: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    for token in ids:
        logits_BWV = jnp.where(jnp.arange(logits_BWV.shape[-1]) == token, -jnp.inf, logits_BWV)
    return logits_BWV
