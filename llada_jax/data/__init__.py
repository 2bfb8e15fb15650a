"""Text becomes rows, and rows become batches: kinds of data, tokenizers, preparation, datasets. No JAX here."""

from llada_jax.data import chat, text
from llada_jax.data.kind import Kind

KINDS: dict[str, Kind] = {"text": text.KIND, "chat": chat.KIND}
