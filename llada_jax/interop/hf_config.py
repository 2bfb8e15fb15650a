"""A published config.json as a `ModelConfig` and back.

Options that the official modeling code obeys and this model cannot compute are refused by name. Whatever else a
config.json says is carried in `ModelConfig.published`, and saving writes it back.
"""

import json
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_jax.data.tokenizer import BOS, EOT, MASK
from llada_jax.fields import InputError
from llada_jax.files import parse_json, read_text
from llada_jax.interop import families
from llada_jax.interop.families.family import Family
from llada_jax.model.config import PRESETS, ModelConfig

# Keys of related models, whatever the family; one that is set means another network.
_FOREIGN = (
    "attn_logit_softcapping", "clip_qkv", "embedding_multiplier", "final_logit_softcapping", "logits_scaling",
    "moe_intermediate_size", "n_experts", "norm_after", "num_experts", "num_local_experts", "partial_rotary_factor",
    "qk_layernorm", "qk_norm", "quantization_config", "residual_multiplier", "sliding_window", "use_qk_norm",
    "use_scheduler_head", "use_sliding_window",
)  # fmt: skip

_LARGEST_FLOAT = 1e300  # JSON has integers that no float can hold


def read_config_text(directory: Path) -> str:
    """The text of the directory's config.json. Raises InputError if there is no such file."""
    path = directory / "config.json"
    if not os.path.isdir(directory):
        raise InputError(f"{directory}: no such directory; it should hold config.json and .safetensors files")
    if not os.path.lexists(path):
        raise InputError(f"{directory}: no config.json in it")
    return read_text(path)


def read_config(text: str, where: str, dtype: str, token_ids: Mapping[str, int]) -> ModelConfig:
    """The `ModelConfig` of a published config.json, computing in `dtype`.

    token_ids: of the special tokens by their text, for the ids that config.json does not name. Raises InputError for
    an unknown family, a missing or impossible value, and every option that this model cannot compute.
    """
    raw = parse_json(text, where)
    name, family = _family(raw, where)
    raw = {**family.defaults, **raw}
    _refuse(raw, family, dtype, where)
    fields = _architecture(raw, family, where)
    fields |= _special_ids(raw, family, fields["vocab_size"], token_ids, where)
    try:
        return ModelConfig(**fields, dtype=dtype, remat="none", family=name, published=text)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('config.model: ')}") from error


def write_config(c: ModelConfig, dtype: str) -> str:
    """The text of a config.json for this model with parameters of `dtype`.

    A model that was loaded gets the text that it was loaded with, except for values that have changed since. Raises
    InputError for a causal model, which no published format can express, and for an unknown family.
    """
    if c.causal:
        raise InputError("a causal model (config.model.causal) has no published format; save the workdir instead")
    family = families.require(c.family)
    wanted = {key: getattr(c, name) for name, key in family.keys.items()}
    if not c.published:
        kind = {"architectures": [family.architecture], "model_type": c.family}
        return _dump({**kind, **family.fresh, **wanted, "torch_dtype": dtype})
    where = "config.model.published"
    raw, loaded = parse_json(c.published, where), read_config(c.published, where, "float32", {})
    from_tokenizer = [name for name in ("bos_token_id", "eot_token_id") if family.keys.get(name) not in raw]
    changed = {
        key: wanted[key]
        for name, key in family.keys.items()
        if name not in from_tokenizer and getattr(loaded, name) != wanted[key]
    }
    changed |= {key: dtype for key in ("torch_dtype", "dtype") if raw.get(key, dtype) != dtype}
    return _dump(raw | changed) if changed else c.published


def _family(raw: dict, where: str) -> tuple[str, Family]:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    for name, family in families.FAMILIES.items():
        if model_type == name or (model_type is None and architectures == [family.architecture]):
            return name, family
    given = repr(model_type or architectures or "missing")[:100]
    raise InputError(f"{where}: model_type {given} is not one of {', '.join(families.FAMILIES)}")


def _refuse(raw: dict, family: Family, dtype: str, where: str) -> None:
    """Raises InputError with every option that this model cannot compute."""
    refused = []
    for key, computed in family.computed.items():
        value = raw.get(key, computed[0])
        if not any(value is x or (type(value) is type(x) and value == x) for x in computed):
            refused.append(f"{key} {_shown(value)} (only {_shown(computed[0])})")
    refused += [f"{key} {_shown(raw[key])}" for key in _FOREIGN if raw.get(key)]
    scaling = raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if kind != "default" or (scaling and scaling.get("factor", 1.0) != 1.0):
        refused.append(f"rope_scaling {_shown(raw['rope_scaling'])}")
    if raw.get("rope_full_precision", True) is not True and dtype != "float32":
        refused.append("rope_full_precision false (in bfloat16; load with dtype float32)")
    if refused:
        raise InputError(f"{where}: this model cannot compute {'; '.join(refused)}")


def _architecture(raw: dict, family: Family, where: str) -> dict[str, Any]:
    """Every field of ModelConfig but the token ids. null and absent mean what they mean to the official code."""
    fields: dict[str, Any] = {}
    for name, key in family.keys.items():
        if name in ("rope_theta", "rms_norm_eps"):
            fields[name] = _positive(raw, key, where)
        elif name == "weight_tying":
            fields[name] = _given(raw, key, where)
            if not isinstance(fields[name], bool):
                raise InputError(f"{where}: {key} is {_shown(fields[name])}, not true or false")
        elif not name.endswith("_id") and not name.startswith("init"):
            is_null = key in family.nullable and raw.get(key, 0) is None
            fields[name] = None if is_null else _natural(_given(raw, key, where), key, where)
    fields["n_kv_heads"] = _kv_heads(raw, fields, where)
    fields.setdefault("vocab_size", fields["embedding_size"])
    fields["embedding_size"] = fields["embedding_size"] or fields["vocab_size"]
    key = family.head_size_key
    if key and raw.get(key) is not None and _natural(raw[key], key, where) * fields["n_heads"] != fields["d_model"]:
        only = f"{family.keys['d_model']} / {family.keys['n_heads']}"
        raise InputError(f"{where}: this model cannot compute {key} {raw[key]} (only {only})")
    if fields["mlp_hidden_size"] is None:
        fields["mlp_hidden_size"] = _natural(_given(raw, "mlp_ratio", where), "mlp_ratio", where) * fields["d_model"]
    # How a model trained from scratch would begin; the weights of the file are not touched by it.
    fields["init"] = "normal" if raw.get(family.keys.get("init"), "normal") == "normal" else "mitchell"
    std = raw.get(family.keys.get("init_std"))
    return fields | {"init_std": std if isinstance(std, float) else 0.02}


def _kv_heads(raw: dict, fields: dict, where: str) -> int:
    """Key heads: null means as many as query heads, or one under multi_query_attention."""
    given, multi_query = fields["n_kv_heads"], raw.get("multi_query_attention")
    implied = 1 if multi_query else fields["n_heads"]
    if given is not None and multi_query is not None and given != implied:
        raise InputError(f"{where}: n_kv_heads {given} contradicts multi_query_attention {_shown(multi_query)}")
    return implied if given is None else given


def _special_ids(
    raw: dict, family: Family, vocab_size: int, token_ids: Mapping[str, int], where: str
) -> dict[str, int]:
    """Token ids: what config.json says, else the tokenizer, else the published model of this size, else EOS."""

    def known(name: str, *fallbacks: int | None) -> int:
        key = family.keys.get(name, name)
        value = raw.get(key)
        value = value[0] if isinstance(value, list) and value else value
        for id in (value, *fallbacks):
            if id is not None:
                return _natural(id, key, where)
        raise InputError(f"{where}: {key} is missing")

    preset = PRESETS[family.preset]
    published = vocab_size == preset.vocab_size
    eos = known("eos_token_id")
    return {
        "mask_token_id": known("mask_token_id", token_ids.get(MASK), family.mask_token_id),
        "eos_token_id": eos,
        "pad_token_id": known("pad_token_id", eos),
        "bos_token_id": known("bos_token_id", token_ids.get(BOS), preset.bos_token_id if published else eos),
        "eot_token_id": known("eot_token_id", token_ids.get(EOT), preset.eot_token_id if published else eos),
    }


def _given(raw: dict, key: str, where: str) -> Any:
    if key not in raw:
        raise InputError(f"{where}: {key} is missing")
    return raw[key]


def _natural(value: Any, key: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(f"{where}: {key} is {_shown(value)}, not a natural number below 2^31")
    return value


def _positive(raw: dict, key: str, where: str) -> float:
    value = raw.get(key, "missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < _LARGEST_FLOAT:
        raise InputError(f"{where}: {key} is {_shown(value)}, not a positive number")
    return float(value)


def _shown(value: Any) -> str:
    """A value for a message, as JSON, cut after 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dump(raw: dict) -> str:
    return json.dumps(raw, indent=2, sort_keys=True) + "\n"
