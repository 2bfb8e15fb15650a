"""LLaDA: `LLaDAModelLM` of GSAI-ML/LLaDA-8B-Base and -Instruct, and LLaDA 1.5 (arXiv 2502.09992)."""

from llada_jax.interop.families.family import Family

_SAME = (
    "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size",
    "max_sequence_length", "rope_theta", "rms_norm_eps", "weight_tying", "mask_token_id", "bos_token_id",
    "eos_token_id", "pad_token_id", "eot_token_id", "init_std",
)  # fmt: skip

FAMILY = Family(
    architecture="LLaDAModelLM",
    preset="llada_8b",
    names={
        "wte": "model.transformer.wte.weight",
        "ln_f": "model.transformer.ln_f.weight",
        "blocks.attn_out": "model.transformer.blocks.{}.attn_out.weight",
        "blocks.ff_out": "model.transformer.blocks.{}.ff_out.weight",
        "blocks.attn_norm": "model.transformer.blocks.{}.attn_norm.weight",
        "blocks.ff_norm": "model.transformer.blocks.{}.ff_norm.weight",
        "blocks.q_proj": "model.transformer.blocks.{}.q_proj.weight",
        "blocks.k_proj": "model.transformer.blocks.{}.k_proj.weight",
        "blocks.v_proj": "model.transformer.blocks.{}.v_proj.weight",
        "blocks.ff_proj": "model.transformer.blocks.{}.ff_proj.weight",
        "blocks.up_proj": "model.transformer.blocks.{}.up_proj.weight",
        "ff_out": "model.transformer.ff_out.weight",
    },
    keys={name: name for name in _SAME} | {"init": "init_fn"},
    defaults=dict(
        n_kv_heads=None, mlp_hidden_size=None, mlp_ratio=4, embedding_size=50304, max_sequence_length=1024,
        rope_theta=10000.0, rms_norm_eps=1e-5, weight_tying=True, multi_query_attention=None, init_fn="normal",
        init_std=0.02, block_type="sequential", activation_type="swiglu", layer_norm_type="default", rope=False,
    ),
    nullable=("n_kv_heads", "mlp_hidden_size", "embedding_size"),
    computed={
        "block_type": ("llama",),
        "activation_type": ("silu",),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "rope": (True,),
        "block_group_size": (1,),
        "alibi": (False, None),
        "attention_layer_norm": (False, None),
        "bias_for_layer_norm": (None, False),
        "include_bias": (False, None),
        "include_qkv_bias": (False, None),
        "input_emb_norm": (False, None),
        "scale_logits": (False, None),
    },
    fresh=dict(
        auto_map={
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        activation_type="silu", alibi=False, alibi_bias_max=8.0, attention_dropout=0.0, attention_layer_norm=False,
        attention_layer_norm_with_affine=True, bias_for_layer_norm=False, block_group_size=1, block_type="llama",
        embedding_dropout=0.0, flash_attention=False, include_bias=False, include_qkv_bias=False,
        init_cutoff_factor=None, init_device="meta", input_emb_norm=False, layer_norm_type="rms",
        layer_norm_with_affine=True, mlp_ratio=4, multi_query_attention=None, precision="amp_bf16",
        residual_dropout=0.0, rope=True, rope_full_precision=True, scale_logits=False, use_cache=False,
    ),
)  # fmt: skip
