"""The forward process: mask ratios and masks. Pure functions; no model, no data, no mesh.

B rows of the global batch, L length.

Draws are made for the whole global batch at once with JAX's partitionable threefry: the bits of row i depend on
(key, i, L) alone, and on B where ratios are balanced or stratified, so a mask is the same on every mesh, number of
hosts and number of microbatches.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.parallel.mesh import BATCH, spec


def mask_ratios(
    key: jax.Array, rows: int, *, eps: float = 1e-3, stratified: bool = False, balanced: bool = False
) -> jax.Array:
    """Mask ratio of each row, p = (1 − ε)·t + ε, float32 [B] (GUIDELINES of the official code).

    t ~ U[0, 1) for each row; stratified: t_i = (u + i/B) mod 1 with one u for the batch, which still makes every t_i
    uniform but spreads them evenly (arXiv 2107.00630, appendix I.1).
    balanced: the same values, but which row gets which of them is drawn by `spread`: every device of a mesh scores
    about as many positions as the others, which would wait for it. Each row is still as likely to get any of them.
    """
    values_key, order_key = jax.random.split(key) if balanced else (key, key)
    if stratified:
        t_B = (jax.random.uniform(values_key) + jnp.arange(rows) / rows) % 1.0
    else:
        t_B = jax.random.uniform(values_key, (rows,))
    if balanced:
        t_B = jnp.sort(t_B)[spread(order_key, rows)]
    # Rounded to 22 bits in between, the product can't be fused with the sum: the same bits in every program. (A fused
    # multiply-add rounds once; in a test one ratio in four differed in its last bit between two compilations.)
    return jax.lax.reduce_precision((1 - eps) * t_B, 8, 22) + eps


def spread(key: jax.Array, count: int) -> jax.Array:
    """0..count-1, int32 [count], in a random order of which numbers that stand together are from all over the range.

    Of n that stand together, from a multiple of n on, each nth of the range has one, and their sum is nearly the same
    everywhere, where n is a product of the largest prime factors of count; for other n it is nearly so. Each place is
    as likely to have any number. (Digits of a Halton sequence in mixed bases, shifted at random; every other one is
    followed by the mirror image of the digits below it.)
    """
    order = jnp.zeros(1, jnp.int32)
    for i, base in enumerate(_prime_factors(count)):
        golden = np.argsort(np.argsort(np.arange(base) * (5**0.5 - 1) / 2 % 1))
        digits = (golden + jax.random.randint(jax.random.fold_in(key, i), (), 0, base)) % base
        below = order[:, None]
        order = jnp.where(digits % 2, len(order) - 1 - below, below) + digits * len(order)
        order = order.ravel()
    return order


def _prime_factors(n: int) -> list[int]:
    """Ascending."""
    for factor in range(2, math.isqrt(n) + 1):
        if n % factor == 0:
            return [factor, *_prime_factors(n // factor)]
    return [n] if n > 1 else []


def masks(key: jax.Array, maskable_BL: jax.Array, ratio_B: jax.Array) -> jax.Array:
    """Each maskable position masked independently with its row's ratio, bool [B, L]."""
    draws_BL = jax.random.uniform(key, maskable_BL.shape, out_sharding=spec(BATCH, "context"))
    return maskable_BL & (draws_BL < ratio_B[:, None])


def mask_tokens(
    key: jax.Array,
    tokens_BL: jax.Array,
    maskable_BL: jax.Array,
    mask_id: int,
    *,
    eps: float,
    stratified: bool,
    balanced: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noisy tokens [B, L], where they are masked (bool [B, L]), and the ratio of each row (float32 [B]).

    What is masked is told by the second result, never by comparing tokens with the mask id: real text may contain it.
    """
    ratio_key, mask_key = jax.random.split(key)
    ratio_B = mask_ratios(ratio_key, len(tokens_BL), eps=eps, stratified=stratified, balanced=balanced)
    masked_BL = masks(mask_key, maskable_BL, ratio_B)
    return jnp.where(masked_BL, mask_id, tokens_BL), masked_BL, ratio_B
