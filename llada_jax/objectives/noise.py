"""The forward process: mask ratios and masks. Pure functions; no model, no data, no mesh.

B rows of the global batch, L length.

Draws are made for the whole global batch at once with JAX's partitionable threefry: the bits of row i depend on
(key, i, L) alone, so a mask is the same on every mesh, number of hosts and number of microbatches.
"""

import jax
import jax.numpy as jnp

from llada_jax.parallel.mesh import BATCH, spec


def mask_ratios(key: jax.Array, rows: int, *, eps: float = 1e-3, stratified: bool = False) -> jax.Array:
    """Mask ratio of each row, p = (1 − ε)·t + ε, float32 [B] (GUIDELINES of the official code).

    t ~ U[0, 1) for each row; stratified: t_i = (u + i/B) mod 1 with one u for the batch, which still makes every t_i
    uniform but spreads them evenly (arXiv 2107.00630, appendix I.1).
    """
    if stratified:
        t_B = (jax.random.uniform(key) + jnp.arange(rows) / rows) % 1.0
    else:
        t_B = jax.random.uniform(key, (rows,))
    # Rounded to 22 bits in between, the product can't be fused with the sum: the same bits in every program. (A fused
    # multiply-add rounds once; in a test one ratio in four differed in its last bit between two compilations.)
    return jax.lax.reduce_precision((1 - eps) * t_B, 8, 22) + eps


def masks(key: jax.Array, maskable_BL: jax.Array, ratio_B: jax.Array) -> jax.Array:
    """Each maskable position masked independently with its row's ratio, bool [B, L]."""
    draws_BL = jax.random.uniform(key, maskable_BL.shape, out_sharding=spec(BATCH, "context"))
    return maskable_BL & (draws_BL < ratio_B[:, None])


def mask_tokens(
    key: jax.Array, tokens_BL: jax.Array, maskable_BL: jax.Array, mask_id: int, *, eps: float, stratified: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Noisy tokens [B, L], where they are masked (bool [B, L]), and the ratio of each row (float32 [B]).

    What is masked is told by the second result, never by comparing tokens with the mask id: real text may contain it.
    """
    ratio_key, mask_key = jax.random.split(key)
    ratio_B = mask_ratios(ratio_key, len(tokens_BL), eps=eps, stratified=stratified)
    masked_BL = masks(mask_key, maskable_BL, ratio_B)
    return jnp.where(masked_BL, mask_id, tokens_BL), masked_BL, ratio_B
