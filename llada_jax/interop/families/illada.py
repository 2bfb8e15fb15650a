"""iLLaDA: `ILLaDAForCausalLM`, tensors named as in Llama (arXiv 2606.25331)."""

from llada_jax.interop.families.family import Family

FAMILY = Family(
    architecture="ILLaDAForCausalLM",
    preset="illada_8b",
    names={
        "wte": "model.embed_tokens.weight",
        "blocks.q_proj": "model.layers.{}.self_attn.q_proj.weight",
        "blocks.k_proj": "model.layers.{}.self_attn.k_proj.weight",
        "blocks.v_proj": "model.layers.{}.self_attn.v_proj.weight",
        "blocks.attn_out": "model.layers.{}.self_attn.o_proj.weight",
        "blocks.ff_proj": "model.layers.{}.mlp.gate_proj.weight",
        "blocks.up_proj": "model.layers.{}.mlp.up_proj.weight",
        "blocks.ff_out": "model.layers.{}.mlp.down_proj.weight",
        "blocks.attn_norm": "model.layers.{}.input_layernorm.weight",
        "blocks.ff_norm": "model.layers.{}.post_attention_layernorm.weight",
        "ln_f": "model.norm.weight",
        "ff_out": "lm_head.weight",
    },
    keys={
        "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size", "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings", "rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps",
        "weight_tying": "tie_word_embeddings", "mask_token_id": "mask_token_id", "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id", "eot_token_id": "eot_token_id",
        "init_std": "initializer_range",
    },
    defaults=dict(num_key_value_heads=None, tie_word_embeddings=True, initializer_range=0.02),
    nullable=("num_key_value_heads",),
    computed={
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "layer_norm_eps": (None,),  # a number would make the norms LayerNorms
        "rope_parameters": (None,),
    },
    fresh=dict(
        auto_map={
            "AutoConfig": "configuration_llada.ILLaDAConfig",
            "AutoModel": "modeling_llada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_llada.ILLaDAForCausalLM",
        },
        attention_bias=False, attention_dropout=0.0, hidden_act="silu", layer_norm_eps=None, mlp_bias=False,
        resid_pdrop=0.0, use_cache=False,
    ),
    mask_token_id=5,
    head_size_key="head_dim",
)  # fmt: skip
