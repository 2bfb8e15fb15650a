"""Text becomes rows: tokenizer, sources, packing, preparation and the Grain pipeline; no JAX here."""
