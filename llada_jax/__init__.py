"""LLaDA in JAX: pre-training, fine-tuning, sampling and scoring of masked-diffusion language models."""
