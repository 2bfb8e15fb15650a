"""LLaDA in JAX: pre-training, fine-tuning, sampling and scoring of masked-diffusion language models."""

import importlib

_HOMES = {
    "ModelConfig": "model.config",
    "Transformer": "model.transformer",
    "answers": "sampling.prompts",
    "confidence_score": "evaluation.likelihood",
    "fit": "library.fit",
    "generate": "sampling.generate",
    "infill": "sampling.generate",
    "load": "interop.hf",
    "load_tokenizer": "interop.hf",
    "log_likelihood": "evaluation.likelihood",
    "log_likelihood_from_masks": "evaluation.likelihood",
    "pretrain_loss": "objectives.diffusion",
    "rolling_log_likelihood": "evaluation.likelihood",
    "save_adapter": "interop.hf",
    "save_hf": "interop.hf",
    "sft_loss": "objectives.diffusion",
    "stream": "sampling.generate",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Public names are imported when first used: command lines and worker processes start fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llada_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llada_jax.{_HOMES[name]}"), name)
