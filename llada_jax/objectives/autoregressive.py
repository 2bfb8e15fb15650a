"""The control: a left-to-right model of the same shape on the same data."""

import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig
from llada_jax.objectives.diffusion import attention_mask
from llada_jax.objectives.elbo import Batch, NoisyBatch
from llada_jax.parallel.mesh import BATCH, TOKENS, reshard


def next_token(batch: Batch, key: jax.Array, model: ModelConfig, objective) -> NoisyBatch:
    """Mean cross-entropy of the next token, wherever that is maskable and of the same document."""
    del key
    tokens_BL, segment_ids_BL = batch["tokens"], batch["segment_ids"]
    next_BL, next_maskable_BL, next_segment_BL = (_next(x) for x in (tokens_BL, batch["maskable"], segment_ids_BL))
    last_BL = jnp.arange(tokens_BL.shape[1]) == tokens_BL.shape[1] - 1
    asked_BL = next_maskable_BL & (next_segment_BL == segment_ids_BL) & ~last_BL
    weights_BL = asked_BL / jnp.maximum(jnp.sum(asked_BL), 1)
    ratio_B = jnp.zeros(len(tokens_BL))
    return NoisyBatch(tokens_BL, next_BL, weights_BL, ratio_B, attention_mask(batch, objective))


def _next(x_BL: jax.Array) -> jax.Array:
    """Each position's successor; a row that is split over `context` is gathered for it."""
    return reshard(jnp.roll(reshard(x_BL, BATCH, None), -1, axis=1), *TOKENS)
