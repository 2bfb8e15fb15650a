"""A published config.json as a `ModelConfig` and back.

What the official modeling code obeys and this model cannot compute is refused by name. What cannot change a number is
carried in `ModelConfig.published`, so that saving gives it back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_jax.data.tokenizer import BOS, EOT, MASK
from llada_jax.fields import InputError
from llada_jax.files import parse_json, read_text
from llada_jax.model.config import PRESETS, ModelConfig

MODEL_TYPES = {"llada": "LLaDAModelLM", "illada": "ILLaDAForCausalLM"}  # and the architecture of each

# Field of config.json for each field of ModelConfig.
_FIELDS: dict[str, dict[str, str]] = {
    "llada": {
        name: name
        for name in (
            "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size",
            "max_sequence_length", "rope_theta", "rms_norm_eps", "weight_tying", "mask_token_id", "bos_token_id",
            "eos_token_id", "pad_token_id", "eot_token_id", "init_std",
        )
    } | {"init": "init_fn"},
    "illada": {
        "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size", "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings", "rope_theta": "rope_theta", "rms_norm_eps": "rms_norm_eps",
        "weight_tying": "tie_word_embeddings", "mask_token_id": "mask_token_id", "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id", "eot_token_id": "eot_token_id",
        "init_std": "initializer_range",
    },
}  # fmt: skip

# What the official configuration class takes for a field that is absent. Fields without a default must be there.
_DEFAULTS: dict[str, dict] = {
    "llada": dict(
        n_kv_heads=None, mlp_hidden_size=None, mlp_ratio=4, embedding_size=50304, max_sequence_length=1024,
        rope_theta=10000.0, rms_norm_eps=1e-5, weight_tying=True, multi_query_attention=None, init_fn="normal",
        init_std=0.02, block_type="sequential", activation_type="swiglu", layer_norm_type="default", rope=False,
    ),
    "illada": dict(num_key_value_heads=None, tie_word_embeddings=True, initializer_range=0.02),
}  # fmt: skip

# The only values that this model computes, for every field that changes the official model's numbers. The first is
# what an absent field means, unless _DEFAULTS says otherwise.
_COMPUTED: dict[str, dict[str, tuple]] = {
    "llada": {
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
    "illada": {
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "layer_norm_eps": (None,),  # a number would make the norms LayerNorms
        "rope_parameters": (None,),
    },
}
# Known from related models; whoever sets one of these means another network.
_FOREIGN = (
    "attn_logit_softcapping", "clip_qkv", "embedding_multiplier", "final_logit_softcapping", "logits_scaling",
    "moe_intermediate_size", "n_experts", "norm_after", "num_experts", "num_local_experts", "partial_rotary_factor",
    "qk_layernorm", "qk_norm", "quantization_config", "residual_multiplier", "sliding_window", "use_qk_norm",
    "use_scheduler_head", "use_sliding_window",
)  # fmt: skip

# What a model that was made here says of itself beside its sizes, so that the official code computes the same.
_FRESH: dict[str, dict] = {
    "llada": dict(
        architectures=["LLaDAModelLM"], model_type="llada",
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
    "illada": dict(
        architectures=["ILLaDAForCausalLM"], model_type="illada",
        auto_map={
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAModel",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        attention_bias=False, attention_dropout=0.0, hidden_act="silu", layer_norm_eps=None, mlp_bias=False,
        resid_pdrop=0.0, rope_scaling=None, use_cache=False,
    ),
}  # fmt: skip

_LARGEST_FLOAT = 1e300  # JSON knows integers that no float can hold
_ILLADA_MASK = 5  # its config names no mask id; arXiv 2606.25331


def read_config_text(directory: Path) -> str:
    """The text of the directory's config.json."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; it should hold config.json and .safetensors files")
    if not path.is_file():
        raise InputError(f"{directory}: no config.json in it")
    return read_text(path)


def read_config(text: str, where: str, dtype: str, token_ids: Mapping[str, int]) -> ModelConfig:
    """The `ModelConfig` of a published config.json, computing in `dtype`.

    token_ids: of the special tokens by their text, for the ids that config.json does not name. Raises InputError for
    another family, a missing or impossible field, and every option that this model cannot compute.
    """
    raw = parse_json(text, where)
    family = _family(raw, where)
    raw = _DEFAULTS[family] | raw
    _refuse(raw, family, dtype, where)
    fields: dict[str, Any] = _architecture(raw, family, where) | _special_ids(raw, family, token_ids, where)
    try:
        return ModelConfig(**fields, dtype=dtype, remat="none", family=family, published=text)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('config.model: ')}") from error


def write_config(c: ModelConfig, dtype: str) -> str:
    """The text of a config.json for this model with parameters of `dtype`.

    That of a model that was loaded is given back as it was, but for fields that are no longer true. Raises InputError
    for a causal model, which no published format can express.
    """
    if c.causal:
        raise InputError("a causal model (config.model.causal) has no published format; save the workdir instead")
    fields = _FIELDS[c.family]
    wanted = {field: getattr(c, name) for name, field in fields.items()}
    if not c.published:
        return _dump(_FRESH[c.family] | wanted | {"torch_dtype": dtype})
    where = "config.model.published"
    raw, told = parse_json(c.published, where), read_config(c.published, where, "float32", {})
    from_tokenizer = [name for name in ("bos_token_id", "eot_token_id") if fields[name] not in raw]
    changed = {
        field: wanted[field]
        for name, field in fields.items()
        if name not in from_tokenizer and getattr(told, name) != wanted[field]
    }
    changed |= {field: dtype for field in ("torch_dtype", "dtype") if raw.get(field, dtype) != dtype}
    return _dump(raw | changed) if changed else c.published


def _family(raw: dict, where: str) -> str:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    for family, architecture in MODEL_TYPES.items():
        if model_type == family or (model_type is None and architectures == [architecture]):
            return family
    given = model_type or architectures or "missing"
    raise InputError(f"{where}: model_type {given!r} is not one of {', '.join(MODEL_TYPES)}")


def _refuse(raw: dict, family: str, dtype: str, where: str) -> None:
    """One line with every option that this model cannot compute."""
    refused = []
    for field, computed in _COMPUTED[family].items():
        value = raw.get(field, computed[0])
        if not any(value is x or (type(value) is type(x) and value == x) for x in computed):
            refused.append(f"{field} {json.dumps(value)} (only {json.dumps(computed[0])})")
    refused += [f"{field} {json.dumps(raw[field])}" for field in _FOREIGN if raw.get(field)]
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind != "default" or (scaling and scaling.get("factor", 1.0) != 1.0):
        refused.append(f"rope_scaling {json.dumps(raw['rope_scaling'])}")
    if raw.get("rope_full_precision", True) is not True and dtype != "float32":
        refused.append("rope_full_precision false (in bfloat16; load with dtype float32)")
    if refused:
        raise InputError(f"{where}: this model cannot compute {'; '.join(refused)}")


def _architecture(raw: dict, family: str, where: str) -> dict:
    """Every field of ModelConfig that is not a token id. null and absent mean what they mean to the official code."""
    fields = {}
    for name, field in _FIELDS[family].items():
        if name in ("rope_theta", "rms_norm_eps"):
            fields[name] = _positive(raw, field, where)
        elif name == "weight_tying":
            fields[name] = raw[field]
            if not isinstance(raw[field], bool):
                raise InputError(f"{where}: {field} is {json.dumps(raw[field])}, not true or false")
        elif not name.endswith("_id") and not name.startswith("init"):
            fields[name] = _integer(raw, field, where)
    fields["n_kv_heads"] = _kv_heads(raw, fields, where)
    if family == "illada":
        fields["vocab_size"] = fields["embedding_size"]
        size = raw.get("head_dim")
        if size is not None and _natural(size, "head_dim", where) * fields["n_heads"] != fields["d_model"]:
            raise InputError(f"{where}: this model cannot compute head_dim {size} (only hidden_size / heads)")
    fields["embedding_size"] = fields["embedding_size"] or fields["vocab_size"]
    if fields["mlp_hidden_size"] is None:
        fields["mlp_hidden_size"] = (_integer(raw, "mlp_ratio", where) or 0) * fields["d_model"]
    # How fresh weights would be drawn; those of the file are not. Schemes that this project lacks are carried along.
    fields["init"] = "normal" if family == "illada" or raw["init_fn"] == "normal" else "mitchell"
    std = raw.get(_FIELDS[family]["init_std"])
    return fields | {"init_std": std if isinstance(std, float) else 0.02}


_MAY_BE_NULL = ("n_kv_heads", "num_key_value_heads", "mlp_hidden_size", "embedding_size")


def _kv_heads(raw: dict, fields: dict, where: str) -> int:
    """Key heads: null means as many as query heads, or one under multi_query_attention."""
    given, multi_query = fields["n_kv_heads"], raw.get("multi_query_attention")
    implied = 1 if multi_query else fields["n_heads"]
    if given is not None and multi_query is not None and given != implied:
        raise InputError(f"{where}: n_kv_heads {given} contradicts multi_query_attention {json.dumps(multi_query)}")
    return implied if given is None else given


def _special_ids(raw: dict, family: str, token_ids: Mapping[str, int], where: str) -> dict[str, int]:
    """Token ids: what config.json says, else the tokenizer, else the published model of this size, else EOS."""

    def known(field: str, *fallbacks: int | None) -> int:
        value = raw.get(field)
        value = value[0] if isinstance(value, list) and value else value
        for id in (value, *fallbacks):
            if id is not None:
                return _natural(id, field, where)
        raise InputError(f"{where}: {field} is missing")

    preset = PRESETS["illada_8b" if family == "illada" else "llada_8b"]
    published = raw["vocab_size"] == preset.vocab_size
    eos = known("eos_token_id")
    return {
        "mask_token_id": known("mask_token_id", token_ids.get(MASK), _ILLADA_MASK if family == "illada" else None),
        "eos_token_id": eos,
        "pad_token_id": known("pad_token_id", eos),
        "bos_token_id": known("bos_token_id", token_ids.get(BOS), preset.bos_token_id if published else eos),
        "eot_token_id": known("eot_token_id", token_ids.get(EOT), preset.eot_token_id if published else eos),
    }


def _integer(raw: dict, field: str, where: str) -> int | None:
    if field not in raw:
        raise InputError(f"{where}: {field} is missing")
    return None if raw[field] is None and field in _MAY_BE_NULL else _natural(raw[field], field, where)


def _natural(value, field: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(f"{where}: {field} is {json.dumps(value)}, not a natural number below 2^31")
    return value


def _positive(raw: dict, field: str, where: str) -> float:
    value = raw.get(field, "missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LARGEST_FLOAT:
        raise InputError(f"{where}: {field} is {json.dumps(value)}, not a positive number")
    return float(value)


def _dump(raw: dict) -> str:
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"
