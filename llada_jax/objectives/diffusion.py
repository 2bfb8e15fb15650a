"""The objectives of masked diffusion: pre-training and fine-tuning (Eqs. 3 and 5 of arXiv 2502.09992).

B rows, L length.
"""

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import inputs
from llada_jax.fields import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.masks import FULL, Mask
from llada_jax.objectives import noise
from llada_jax.objectives.elbo import Batch, NoisyBatch, weighted_loss


def pretrain(batch: Batch, key: jax.Array, model: ModelConfig, objective) -> NoisyBatch:
    """Σ over masked of CE / p, divided by all tokens that are not padding (Eq. 3 of arXiv 2502.09992)."""
    noisy_BL, masked_BL, ratio_B = _mask(batch, key, model, objective)
    weights_BL = masked_BL / ratio_B[:, None] / jnp.maximum(jnp.sum(batch["maskable"]), 1)
    return NoisyBatch(noisy_BL, batch["tokens"], weights_BL, ratio_B, attention_mask(batch, objective))


def sft(batch: Batch, key: jax.Array, model: ModelConfig, objective) -> NoisyBatch:
    """Σ over masked answer tokens of CE / p / answer length, averaged over rows (Eq. 5 of arXiv 2502.09992)."""
    noisy_BL, masked_BL, ratio_B = _mask(batch, key, model, objective)
    per_row_B = 1.0 / (ratio_B * jnp.maximum(batch["answer_length"], 1) * len(batch["tokens"]))
    weights_BL = masked_BL * per_row_B[:, None]
    return NoisyBatch(noisy_BL, batch["tokens"], weights_BL, ratio_B, attention_mask(batch, objective))


def attention_mask(batch: Batch, objective) -> Mask:
    """Which tokens see which, by config.objective.attention: the row with its padding ("full"), the row without it
    ("padding"), or their own document ("documents")."""
    ids_BL = batch["segment_ids"]
    segments = {"full": None, "padding": (ids_BL > 0).astype(jnp.int32), "documents": ids_BL}[objective.attention]
    return Mask(segment_ids=segments)


def _mask(batch: Batch, key, model: ModelConfig, objective):
    return noise.mask_tokens(
        key, batch["tokens"], batch["maskable"], model.mask_token_id,
        eps=objective.eps, stratified=objective.stratified, balanced=objective.balanced,
    )  # fmt: skip


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
    return weighted_loss(model, NoisyBatch(noisy_BL, tokens_BL, weights_BL, ratio_BL[:, 0], FULL))[0]
