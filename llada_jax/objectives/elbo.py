"""The objectives. Each turns a batch into a noisy batch with weights; one function then computes any of their losses.

B rows, L length. An objective has the signature (batch, key, model_config, objective_config) -> NoisyBatch and does all
that depends on the whole global batch (draws, normalisers), so that splitting the result into microbatches afterwards
changes nothing but memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import inputs
from llada_jax.inputs import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.objectives import noise
from llada_jax.objectives.cross_entropy import scored_cross_entropy
from llada_jax.parallel.mesh import BATCH, TOKENS, reshard

BUCKETS = 10  # of mask ratio, for metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Batch:
    """What the data pipeline yields. Pre-training and fine-tuning differ only here and in the objective."""

    tokens: jax.Array  # int32 [B, L]
    segment_ids: jax.Array  # int32 [B, L]; documents of a row, 0 is padding
    maskable: jax.Array  # bool [B, L]; may be masked and scored
    answer_length: jax.Array  # int32 [B]; normaliser of fine-tuning: EOS padding of the answer counts
    replaced: jax.Array | None = None  # bool [B]; stands in for a damaged row (config.data.on_damage "skip"); to count


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class NoisyBatch:
    """What the model sees and what it is asked."""

    inputs: jax.Array  # int32 [B, L]
    targets: jax.Array  # int32 [B, L]
    weights: jax.Array  # float32 [B, L]; 0 where nothing is asked; the loss is Σ weight·CE
    ratio: jax.Array  # float32 [B]; mask ratio of each row (0 for autoregressive)
    segment_ids: jax.Array | None  # int32 [B, L], or None where every token sees the whole row


def pretrain(batch: Batch, key, model: ModelConfig, objective) -> NoisyBatch:
    """Σ over masked of CE / p, divided by all tokens that are not padding (Eq. 3 of arXiv 2502.09992)."""
    noisy_BL, masked_BL, ratio_B = _corrupt(batch, key, model, objective)
    weights_BL = masked_BL / ratio_B[:, None] / jnp.maximum(jnp.sum(batch.maskable), 1)
    return NoisyBatch(noisy_BL, batch.tokens, weights_BL, ratio_B, _visibility(batch, objective))


def sft(batch: Batch, key, model: ModelConfig, objective) -> NoisyBatch:
    """Σ over masked answer tokens of CE / p / answer length, averaged over rows (Eq. 5 of arXiv 2502.09992)."""
    noisy_BL, masked_BL, ratio_B = _corrupt(batch, key, model, objective)
    per_row_B = 1.0 / (ratio_B * jnp.maximum(batch.answer_length, 1) * len(batch.tokens))
    return NoisyBatch(noisy_BL, batch.tokens, masked_BL * per_row_B[:, None], ratio_B, _visibility(batch, objective))


def autoregressive(batch: Batch, key, model: ModelConfig, objective) -> NoisyBatch:
    """The control: mean CE of the next token, wherever that is maskable and of the same document."""
    del key
    next_BL, next_maskable_BL, next_segment_BL = (_next(x) for x in (batch.tokens, batch.maskable, batch.segment_ids))
    last_BL = jnp.arange(batch.tokens.shape[1]) == batch.tokens.shape[1] - 1
    asked_BL = next_maskable_BL & (next_segment_BL == batch.segment_ids) & ~last_BL
    weights_BL = asked_BL / jnp.maximum(jnp.sum(asked_BL), 1)
    ratio_B = jnp.zeros(len(batch.tokens))
    return NoisyBatch(batch.tokens, next_BL, weights_BL, ratio_B, _visibility(batch, objective))


def _next(x_BL: jax.Array) -> jax.Array:
    """Each position's successor; a row that is split over `context` is gathered for it."""
    return reshard(jnp.roll(reshard(x_BL, BATCH, None), -1, axis=1), *TOKENS)


def objective_named(name: str):
    """The objective of `config.objective.name`. Raises InputError for an unknown one."""
    known = {"pretrain": pretrain, "sft": sft, "autoregressive": autoregressive}
    if name not in known:
        raise InputError(f"config.objective.name {name!r} is not one of {', '.join(known)}")
    return known[name]


def noisy_loss(model, noisy: NoisyBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a noisy batch, and sums from which the metrics are made (additive over microbatches).

    ce_sum, ce_count [BUCKETS]: unweighted cross-entropy at scored positions by mask ratio, nats.
    elbo_sum: Σ CE / p over scored positions, nats.
    """
    hidden_BLD = model.hidden(noisy.inputs, noisy.segment_ids)
    head_VD = model.head[...].astype(hidden_BLD.dtype)
    scored: Any = scored_cross_entropy  # custom_vjp hides its result's type
    loss, ce_BL = scored(hidden_BLD, head_VD, noisy.targets, noisy.weights)
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


def pretrain_loss(model, tokens, masked, mask_ratio) -> jax.Array:
    """The pre-training loss of noise drawn elsewhere, float32 scalar: Σ over masked of CE / ratio / (B · L).

    tokens: int [B, L] before masking. masked: bool [B, L]. mask_ratio: float [B] or [B, L], in (0, 1] where something
    is masked. Differentiable in the model. Raises InputError when shapes differ, and for values that are impossible as
    far as they are known: not those that are traced.
    """
    tokens_BL, masked_BL, ratio_BL = _drawn(model.config, tokens, masked, mask_ratio)
    return _masked_loss(model, tokens_BL, masked_BL, ratio_BL, 1.0 / tokens_BL.size)


def sft_loss(model, tokens, masked, mask_ratio, prompt_lengths) -> jax.Array:
    """The fine-tuning loss of noise drawn elsewhere: mean over rows of Σ over masked of CE / ratio / answer length.

    As `pretrain_loss`; prompt_lengths: int [B]. What is masked in a prompt is put back; all that follows it, padding
    with EOS included, is answer.
    """
    tokens_BL, masked_BL, ratio_BL = _drawn(model.config, tokens, masked, mask_ratio)
    B, L = tokens_BL.shape
    lengths = inputs.array("prompt_lengths", prompt_lengths, "iu")
    if lengths.shape != (B,):
        raise InputError(f"prompt_lengths has shape {lengths.shape}; it must be ({B},), one for each row")
    known = inputs.values(lengths)
    if known is not None and not np.all((known >= 0) & (known <= L)):
        raise InputError(f"prompt_lengths must be from 0 to {L}, the length of the rows")
    prompt_B = jnp.asarray(lengths, jnp.int32)
    masked_BL &= jnp.arange(L) >= prompt_B[:, None]
    return _masked_loss(model, tokens_BL, masked_BL, ratio_BL, 1.0 / (jnp.maximum(L - prompt_B, 1) * B)[:, None])


def _drawn(c: ModelConfig, tokens, masked, mask_ratio) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens, masked = inputs.array("tokens", tokens, "iu"), inputs.array("masked", masked, "biuf")
    ratio = inputs.array("mask_ratio", mask_ratio, "iuf")
    if tokens.ndim != 2 or tokens.size == 0 or masked.shape != tokens.shape:
        raise InputError(f"tokens has shape {tokens.shape} and masked {masked.shape}; both must be [rows, length]")
    if ratio.shape not in (tokens.shape[:1], tokens.shape):
        raise InputError(f"mask_ratio has shape {ratio.shape}; it must be {tokens.shape[:1]} or {tokens.shape}")
    known = [inputs.values(x) for x in (tokens, masked, ratio)]
    if known[0] is not None:
        inputs.token_ids("batch", known[0], c.embedding_size, "[rows, length]")
    if known[1] is not None:
        asked = inputs.zeros_and_ones("masked", known[1])
        if known[2] is not None:
            inputs.ratios(asked, known[2] if ratio.ndim == 2 else known[2][:, None])
    tokens_BL, masked_BL = jnp.asarray(tokens, jnp.int32), jnp.asarray(masked, bool)
    ratio = jnp.asarray(ratio, jnp.float32)
    ratio_BL = jnp.broadcast_to(ratio[:, None] if ratio.ndim == 1 else ratio, tokens_BL.shape)
    return tokens_BL, masked_BL, ratio_BL


def _masked_loss(model, tokens_BL, masked_BL, ratio_BL, share) -> jax.Array:
    """Σ over masked of CE / ratio · share."""
    weights_BL = jnp.where(masked_BL, share / ratio_BL, 0.0)
    noisy_BL = jnp.where(masked_BL, model.config.mask_token_id, tokens_BL)
    return noisy_loss(model, NoisyBatch(noisy_BL, tokens_BL, weights_BL, ratio_BL[:, 0], segment_ids=None))[0]


def _corrupt(batch: Batch, key, model: ModelConfig, objective):
    return noise.corrupt(
        key, batch.tokens, batch.maskable, model.mask_token_id, eps=objective.eps, stratified=objective.stratified
    )


def _visibility(batch: Batch, objective) -> jax.Array | None:
    """Segment ids for the model: none (all see all), padding hidden, or each document by itself."""
    kinds = {
        "full": lambda ids: None,
        "padding": lambda ids: (ids > 0).astype(jnp.int32),
        "documents": lambda ids: ids,
    }
    if objective.attention not in kinds:
        raise InputError(f"config.objective.attention {objective.attention!r} is not one of {', '.join(kinds)}")
    return kinds[objective.attention](batch.segment_ids)
