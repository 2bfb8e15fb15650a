"""A model config small enough to enumerate."""

import dataclasses

from llada_jax.model.config import PRESETS

TINY = dataclasses.replace(
    PRESETS["tiny"], d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48, vocab_size=64,
    embedding_size=64, max_sequence_length=64,
)  # fmt: skip
