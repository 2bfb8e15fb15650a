"""Text becomes rows: tokenizer, sources, packing, preparation, Grain pipeline; no JAX here."""
