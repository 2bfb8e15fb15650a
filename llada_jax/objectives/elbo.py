"""What every objective comes down to: rows of noisy tokens with weights, and the loss of a model's answers.

B rows, L length. The ELBO of a row is -Σ weight·CE over its positions, nats: what `Objective.corrupt` puts into the
weights decides of what it is the bound.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llada_jax.model.masks import Mask
from llada_jax.objectives.cross_entropy import scored_cross_entropy

BUCKETS = 10  # of mask ratio, for metrics

Batch = Mapping[str, jax.Array]  # named arrays [B, ...] of the global batch; which ones is the data kind's affair


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class NoisyBatch:
    """What the model sees and what it is asked."""

    inputs: jax.Array  # int32 [B, L]
    targets: jax.Array  # int32 [B, L]
    weights: jax.Array  # float32 [B, L]; 0 where nothing is asked
    ratio: jax.Array  # float32 [B]; mask ratio of each row (0 for autoregressive)
    mask: Mask  # which tokens see which
    extras: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # for `combine`; any shapes


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective is two functions.

    corrupt: (batch, key, model config, config.objective) -> NoisyBatch. All that depends on the whole global batch
        happens here (draws, normalisers), so that splitting the rows into microbatches changes nothing but memory.
    combine: (row ELBOs float32 [B], extras) -> (loss, metrics), float32 scalars; None: the loss is -Σ of the row ELBOs.
        It may be any differentiable function; see training/step.py for how its gradient is taken.
    causal: whether it is an objective of left-to-right models (config.model.causal), and only of these.
    """

    corrupt: Callable[[Batch, jax.Array, Any, Any], NoisyBatch]
    combine: Callable[[jax.Array, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]] | None = None
    causal: bool = False


def weighted_loss(model, noisy: NoisyBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ weight·CE, float32 scalar, and sums from which the metrics are made (additive over microbatches).

    ce_sum, ce_count [BUCKETS]: unweighted cross-entropy at scored positions by mask ratio, nats.
    elbo_sum: Σ CE / p over scored positions, nats.
    """
    loss, ce_BL = _cross_entropies(model, noisy)
    scored_BL = noisy.weights != 0
    bucket_B = jnp.clip((noisy.ratio * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
    in_bucket_BK = (bucket_B[:, None] == jnp.arange(BUCKETS)).astype(jnp.float32)
    weight_B = jnp.where(noisy.ratio > 0, 1.0 / jnp.maximum(noisy.ratio, 1e-6), 1.0)
    sums = {
        "ce_sum": jnp.sum(jnp.sum(ce_BL, axis=1)[:, None] * in_bucket_BK, axis=0),
        "ce_count": jnp.sum(jnp.sum(scored_BL, axis=1)[:, None] * in_bucket_BK, axis=0),
        "elbo_sum": jnp.sum(jnp.sum(ce_BL, axis=1) * weight_B),
    }
    return loss, jax.lax.stop_gradient(sums)


def row_elbos(model, noisy: NoisyBatch) -> jax.Array:
    """-Σ weight·CE of each row, float32 [B], nats. Not differentiable; see training/step.py."""
    _, ce_BL = _cross_entropies(model, noisy)
    return -jnp.sum(jnp.where(noisy.weights == 0, 0.0, noisy.weights * ce_BL), axis=1)


def _cross_entropies(model, noisy: NoisyBatch) -> tuple[jax.Array, jax.Array]:
    hidden_BLD = model.hidden(noisy.inputs, noisy.mask)
    head_VD = model.head[...].astype(hidden_BLD.dtype)
    scored: Any = scored_cross_entropy  # custom_vjp hides its result's type
    return scored(hidden_BLD, head_VD, noisy.targets, noisy.weights)
