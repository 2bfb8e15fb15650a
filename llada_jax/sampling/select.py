"""What to put at a masked position, how sure the model is of it, and which positions to commit.

B rows, W columns of a window, V vocabulary.
"""

import jax
import jax.numpy as jnp

_LAST = -1e30  # score of what may be committed, but only when nothing else is left


def choose(key: jax.Array, logits_BWV: jax.Array, temperature: float, mask_id: int) -> jax.Array:
    """The predicted token, int32 [B, W]: argmax of logits + temperature · Gumbel noise. MASK is never predicted.

    The noise is drawn in high-range mode: ordinary float32 noise ends at 15.9 and could never choose a token far below
    the best one (arXiv 2409.02908 on why low precision harms samples).
    """
    logits_BWV = _without(logits_BWV, (mask_id,))
    if temperature > 0:
        logits_BWV += temperature * jax.random.gumbel(key, logits_BWV.shape, jnp.float32, mode="high")
    return jnp.argmax(logits_BWV, axis=-1).astype(jnp.int32)


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


def quota(masks_B: jax.Array, steps: int, step: jax.Array) -> jax.Array:
    """How many of a block's masks to commit at a step: spread evenly, the remainder on the first steps."""
    return masks_B // steps + (step < masks_B % steps)


def most_confident(score_BW: jax.Array, open_BW: jax.Array, count_B: jax.Array) -> jax.Array:
    """The `count` open positions of the highest score in each row, bool [B, W]; ties go to the left."""
    order_BW = jnp.argsort(jnp.where(open_BW, -score_BW, jnp.inf), axis=-1, stable=True)
    rank_BW = jnp.argsort(order_BW, axis=-1)
    return open_BW & (rank_BW < count_B[:, None])


def _without(logits_BWV: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    for token in ids:
        logits_BWV = jnp.where(jnp.arange(logits_BWV.shape[-1]) == token, -jnp.inf, logits_BWV)
    return logits_BWV
