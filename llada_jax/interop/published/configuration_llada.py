# Copyright the llada_jax authors. Licensed under the Apache License, Version 2.0; you may not use this file except in
# compliance with the License, a copy of which is at https://www.apache.org/licenses/LICENSE-2.0. It is distributed
# "AS IS", without warranties or conditions of any kind.
"""The configs of LLaDA and iLLaDA for transformers: the keys of their architecture, whatever else config.json says."""

from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"
    attribute_map = {  # names that tools for transformers ask for
        "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads", "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }  # fmt: skip

    def __init__(
        self, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, vocab_size=126464,
        embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0, rms_norm_eps=1e-5, weight_tying=False,
        mask_token_id=126336, **others,
    ):  # fmt: skip
        self.d_model, self.n_layers, self.n_heads, self.n_kv_heads = d_model, n_layers, n_heads, n_kv_heads
        self.mlp_hidden_size, self.max_sequence_length = mlp_hidden_size, max_sequence_length
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.rope_theta, self.rms_norm_eps = rope_theta, rms_norm_eps
        self.weight_tying, self.mask_token_id = weight_tying, mask_token_id
        others["tie_word_embeddings"] = False  # a tied model has no head of its own, so that nothing is to be tied
        super().__init__(**others)


class ILLaDAConfig(PretrainedConfig):
    model_type = "illada"
    attribute_map = {  # the names that LLaDA has for them
        "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size", "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings", "weight_tying": "tie_word_embeddings",
    }  # fmt: skip

    def __init__(
        self, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=None,
        intermediate_size=14336, vocab_size=155136, max_position_embeddings=8192, rope_theta=500000.0,
        rms_norm_eps=1e-5, tie_word_embeddings=True, mask_token_id=5, **others,
    ):  # fmt: skip
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size, self.max_position_embeddings = intermediate_size, max_position_embeddings
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.rope_theta, self.rms_norm_eps = rope_theta, rms_norm_eps
        others["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**others)
