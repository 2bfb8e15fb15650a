"""tests/golden/reference, which the official code made, and variants of it."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from llada_jax.interop import hf, tensor_names
from llada_jax.interop.workdir import named_leaves
from llada_jax.model.config import ModelConfig

REFERENCE = Path(__file__).parent / "golden" / "reference"


@functools.cache
def vectors(kind):
    """{case: {array name: array}} and the json of the cases."""
    cases: dict = {}
    for name, array in load_file(REFERENCE / f"{kind}.safetensors").items():
        case, _, rest = name.partition("/")
        cases.setdefault(case, {})[rest] = array
    return cases, json.loads((REFERENCE / f"{kind}.json").read_text())["cases"]


@functools.cache
def load(checkpoint, compute=None):
    """The model of a reference checkpoint, float32; `compute` in another dtype is what autocast does."""
    model = hf.load(REFERENCE / checkpoint)
    return model if compute is None else hf.with_dtype(model, compute)


def published(model):
    """{published name: array} of a model, or of gradients in its shape."""
    leaves = dict(named_leaves(model))
    pick = lambda t: leaves[t.parameter] if t.layer is None else leaves[t.parameter][t.layer]
    return {t.name: np.asarray(pick(t)).reshape(t.shape) for t in tensor_names.tensors(model.config)}


def names_of(directory):
    return sorted(path.name for path in directory.iterdir())


def copy(source, target, **changes):
    """A copy of a checkpoint with changes to its config.json; a value of ... removes the field."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


def tiny_illada(tie=True):
    return ModelConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=48, vocab_size=64, embedding_size=64,
        max_sequence_length=64, rope_theta=1e4, rms_norm_eps=1e-6, weight_tying=tie, mask_token_id=5, bos_token_id=1,
        eos_token_id=2, pad_token_id=2, eot_token_id=2, init="normal", dtype="float32", remat="none", family="illada",
    )  # fmt: skip


def write_illada(directory, model, **changes):
    """The weights under the Llama names, by hand; and a config.json in the manner of the published one."""
    inner = dict(q_proj="self_attn.q_proj", k_proj="self_attn.k_proj", v_proj="self_attn.v_proj",
                 attn_out="self_attn.o_proj", ff_proj="mlp.gate_proj", up_proj="mlp.up_proj", ff_out="mlp.down_proj",
                 attn_norm="input_layernorm", ff_norm="post_attention_layernorm")  # fmt: skip
    outer = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    tensors = {}
    for name, x in published(model).items():
        parts = name.split(".")[2:]
        layer = parts[0] == "blocks"
        tensors[f"model.layers.{parts[1]}.{inner[parts[2]]}.weight" if layer else f"{outer[parts[0]]}.weight"] = x
    c = model.config
    config = dict(
        architectures=["ILLaDAForCausalLM"], model_type="illada", hidden_size=c.d_model, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, intermediate_size=c.mlp_hidden_size,
        vocab_size=c.vocab_size, max_position_embeddings=64, rope_theta=c.rope_theta, rms_norm_eps=c.rms_norm_eps,
        tie_word_embeddings=c.weight_tying, hidden_act="silu", attention_bias=False, mlp_bias=False,
        layer_norm_eps=None, rope_scaling=None, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        initializer_range=0.02, torch_dtype="float32", attention_dropout=0.0, resid_pdrop=0.0,
    ) | changes  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
