"""Published checkpoints: the official logits, files that come back byte for byte, and one clear line for each defect."""

import dataclasses
import filecmp
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import REFERENCE, load, published, vectors
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from llada_jax import checkpoint, sharding
from llada_jax.config import PRESETS, InputError, ModelConfig
from llada_jax.interop import hf, hf_config, names, safetensors_io
from llada_jax.model import Transformer

ROOT = Path(__file__).parent.parent
A, B, SHARDED, BF16 = (
    REFERENCE / name for name in ("ckpt_a_mha", "ckpt_b_gqa_tied", "ckpt_a_mha_sharded", "ckpt_a_mha_bf16")
)
CASES = {case: m for case, m in vectors("logits")[1].items() if m["ckpt"] != "ckpt_d_options"}


def names_of(directory):
    return sorted(path.name for path in directory.iterdir())


def same_files(a, b):
    assert names_of(a) == names_of(b)
    assert [n for n in names_of(a) if not filecmp.cmp(a / n, b / n, shallow=False)] == []


def copy(source, target, **changes):
    """A copy of a checkpoint with changes to its config.json; a value of ... removes the field."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(config))
    return target


# The official logits.


def logits_of(case, model):
    arrays = vectors("logits")[0][case]
    segment_ids = arrays.get("attention_mask")
    if "attention_bias" in arrays:  # two documents in a row
        visible = arrays["attention_bias"][0, 0]
        segment_ids = np.argmax(visible, axis=1)[None].astype(np.int32) + 1
        assert (visible == (segment_ids[0][:, None] == segment_ids[0])).all()
    found = model(jnp.asarray(arrays["input_ids"]), None if segment_ids is None else jnp.asarray(segment_ids))
    return np.asarray(found, np.float32), load_torch(REFERENCE / "logits.safetensors")[f"{case}/logits"].float().numpy()


@pytest.mark.parametrize("case", [case for case, m in CASES.items() if m["dtype"] == "fp32"])
def test_float32_logits_are_the_official_ones_padding_and_all(case):
    found, wanted = logits_of(case, load(CASES[case]["ckpt"]))
    assert np.abs(found - wanted).max() <= (3e-5 if case.startswith("e") else 1e-3)
    assert (found.argmax(-1) == wanted.argmax(-1)).all()


@pytest.mark.parametrize("case", [case for case, m in CASES.items() if m["dtype"] != "fp32"])
def test_bfloat16_logits_are_as_near_as_bfloat16_allows(case):
    m = CASES[case]
    autocast = m["dtype"] == "autocast_bf16"
    model = load(m["ckpt"], "bfloat16") if autocast else hf.load(REFERENCE / m["ckpt"], "bfloat16")
    assert model.wte.dtype == ("float32" if autocast else "bfloat16")
    found, wanted = logits_of(case, model)
    assert np.abs(found - wanted).mean() <= 1.25 * m["mean_abs_diff_vs_fp32_model"]
    assert np.abs(found - wanted).max() <= 2.5 * m["max_abs_diff_vs_fp32_model"]
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.85


def test_float32_rounded_on_loading_is_the_published_bfloat16():
    rounded, stored = hf.load(A, "bfloat16"), hf.load(BF16)
    assert (stored.config.dtype, stored.config.remat) == ("bfloat16", "none")
    assert jax.tree.leaves(stored)[0].dtype == jnp.bfloat16
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(stored), strict=True))
    widened = hf.load(BF16, "float32")
    assert widened.config.dtype == "float32" and (widened.wte[...] == stored.wte[...].astype(jnp.float32)).all()


# There and back.


@pytest.mark.parametrize(
    "name, size", [("ckpt_a_mha", "5GB"), ("ckpt_a_mha_bf16", 10**9), ("ckpt_b_gqa_tied", "1 GiB"),
                   ("ckpt_a_mha_sharded", "215KB"), ("ckpt_e_train", "900kb")],
)  # fmt: skip
def test_what_was_loaded_comes_back_byte_for_byte(tmp_path, name, size):
    told = []
    model = hf.load(REFERENCE / name, progress=told.append)
    hf.save_hf(model, tmp_path / "out", size, source_dir=REFERENCE / name, progress=told.append)
    same_files(REFERENCE / name, tmp_path / "out")
    assert sum(told) == 2 * sum(x.nbytes for x in jax.tree.leaves(model))
    assert names_of(tmp_path) == ["out"]


def test_no_shard_is_larger_than_asked_unless_it_is_one_tensor(tmp_path):
    hf.save_hf(load("ckpt_a_mha"), tmp_path / "out", "100KB")
    stored = safetensors_io.read_directory(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        inside = [t.nbytes for t in stored.values() if t.path == path]
        assert sum(inside) <= 100_000 or len(inside) == 1
    index = json.loads((tmp_path / "out" / safetensors_io.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert set(index["weight_map"]) == set(stored)


def test_shards_and_one_file_hold_the_same_model(tmp_path):
    models = [hf.load(A), hf.load(SHARDED)]
    shutil.copytree(SHARDED, tmp_path / "unindexed", ignore=shutil.ignore_patterns("*.index.json"))
    models.append(hf.load(tmp_path / "unindexed"))
    for other in models[1:]:
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), models[0], other))


def test_companions_travel_with_the_model(tmp_path):
    source = copy(B, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    for name in ("tokenizer.model", "modeling_llada.py", "notes.txt"):
        (source / name).write_text("#")
    model = hf.load(source)
    hf.save_hf(model, tmp_path / "out", source_dir=source)
    assert set(names_of(source)) - set(names_of(tmp_path / "out")) == {"notes.txt"}
    hf.save_hf(model, tmp_path / "alone")
    assert names_of(tmp_path / "alone") == ["config.json", "model.safetensors"]
    with pytest.raises(InputError, match="no such directory"):
        hf.save_hf(model, tmp_path / "x", source_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tiny", "illada"])
def test_a_model_made_here_gets_a_config_that_says_all_of_it(tmp_path, name, tiny):
    ids = dict(eot_token_id=7, pad_token_id=8)
    c = dataclasses.replace(tiny, **ids) if name == "tiny" else tiny_illada(tie=False)
    model = Transformer(c, jax.random.key(1))
    hf.save_hf(model, tmp_path / "out")
    again = hf.load(tmp_path / "out")
    assert dataclasses.replace(again.config, published="", init="mitchell") == dataclasses.replace(c, init="mitchell")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), jax.tree.leaves(model), jax.tree.leaves(again)))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    if name == "tiny":  # every field that the official config has, and the same values where they are not sizes
        official = json.loads((A / "config.json").read_text())
        own = {"transformers_version", "eos_token_id", "mask_token_id", "pad_token_id", "vocab_size", "embedding_size",
               "d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length"}  # fmt: skip
        assert {k: v for k, v in official.items() if k not in own}.items() <= fields.items()
        assert set(official) - set(fields) == {"transformers_version"}
    hf.save_hf(again, tmp_path / "twice")
    same_files(tmp_path / "out", tmp_path / "twice")


def test_config_json_stays_true_when_the_model_has_changed(tmp_path):
    model = hf.load(A, "bfloat16")
    like = checkpoint.abstract_model(dataclasses.replace(model.config, rope_theta=1e4, eos_token_id=3), None)
    model = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))
    hf.save_hf(model, tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (A, tmp_path / "out"))
    changed = {"torch_dtype": "bfloat16", "rope_theta": 1e4, "eos_token_id": 3}
    assert {k: v for k, v in after.items() if before[k] != v} == changed and set(before) == set(after)


def test_token_ids_that_config_json_lacks_come_from_the_tokenizer(tmp_path):
    assert hf.load(A).config.eot_token_id == 497  # there is no tokenizer beside it: EOS
    source = copy(A, tmp_path / "source")
    shutil.copy(Path(__file__).parent / "golden" / "tokenizer" / "tokenizer.json", source)
    c = hf.load(source).config
    assert (c.mask_token_id, c.bos_token_id, c.eos_token_id, c.eot_token_id) == (508, 496, 497, 511)


@pytest.mark.parametrize("change", [{"n_kv_heads": None}, {"multi_query_attention": False}, {"embedding_size": None},
                                    {"mlp_hidden_size": None, "mlp_ratio": 2.5}, {"attention_dropout": 0.1},
                                    {"something_new": {"a": 1}}, {"rope_full_precision": False}])  # fmt: skip
def test_null_fields_mean_what_they_mean_officially_and_unknown_ones_are_carried(tmp_path, change):
    source = copy(A, tmp_path / "source", **change)
    if "mlp_ratio" in change:  # a fraction is no ratio; 160 is not a multiple of 64
        with pytest.raises(InputError, match="mlp_ratio is 2.5"):
            hf.load(source)
        return
    model = hf.load(source)
    plain = dataclasses.replace(model.config, published=load("ckpt_a_mha").config.published)
    assert plain == load("ckpt_a_mha").config
    hf.save_hf(model, tmp_path / "out", source_dir=source)
    same_files(source, tmp_path / "out")


def test_mlp_ratio_and_multi_query_attention_stand_in_for_nulls(tmp_path):
    shape = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=1, mlp_hidden_size=96, vocab_size=64, embedding_size=64)
    model = Transformer(dataclasses.replace(PRESETS["tiny"], **shape), jax.random.key(0))
    hf.save_hf(model, tmp_path / "out")
    nulls = dict(n_kv_heads=None, multi_query_attention=True, mlp_hidden_size=None, mlp_ratio=3)
    again = hf.load(copy(tmp_path / "out", tmp_path / "nulls", **nulls))
    assert (again.config.n_kv_heads, again.config.mlp_hidden_size) == (1, 96)
    hf.save_hf(again, tmp_path / "back")
    same_files(tmp_path / "nulls", tmp_path / "back")


# Meshes.


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 8, 1, 1), (1, 1, 2, 4)])
@pytest.mark.parametrize("name", ["ckpt_b_gqa_tied", "ckpt_a_mha_sharded"])
def test_a_model_is_born_sharded_and_saved_from_shards(tmp_path, sizes, name):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    read = []
    model, alone = hf.load(REFERENCE / name, mesh=mesh, progress=read.append), load(name)
    assert sum(read) == sum(x.nbytes for x in jax.tree.leaves(alone))  # copies on several devices are read once
    with jax.set_mesh(mesh):
        born = jax.jit(Transformer, static_argnums=0)(model.config, jax.random.key(0))
    for ours, fresh, whole in zip(*map(jax.tree.leaves, (model, born, alone)), strict=True):
        assert ours.sharding.is_equivalent_to(fresh.sharding, ours.ndim) and (np.asarray(ours) == whole).all()
    hf.save_hf(model, tmp_path / "out", "215KB", source_dir=REFERENCE / name)
    wanted = REFERENCE / name
    if name == "ckpt_b_gqa_tied":
        hf.save_hf(alone, tmp_path / "alone", "215KB", source_dir=wanted)
        wanted = tmp_path / "alone"
    same_files(wanted, tmp_path / "out")


# iLLaDA.


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


@pytest.mark.parametrize("tie", [True, False])
def test_illada_names_hold_the_same_model_as_llada_names(tmp_path, tie):
    config = tiny_illada(tie)
    model = Transformer(dataclasses.replace(config, family="llada"), jax.random.key(3))
    source = write_illada(tmp_path / "illada", model)
    loaded = hf.load(source)
    assert dataclasses.replace(loaded.config, published="") == config
    hf.save_hf(model, tmp_path / "llada")
    tokens = jnp.arange(48).reshape(2, 24)
    segment_ids = jnp.asarray(np.tri(24)[[20, 23]], jnp.int32)
    assert (loaded(tokens, segment_ids) == hf.load(tmp_path / "llada")(tokens, segment_ids)).all()
    hf.save_hf(loaded, tmp_path / "back")
    same_files(source, tmp_path / "back")


def test_a_tied_head_may_be_stored_again_but_not_another_one(tmp_path):
    model = Transformer(dataclasses.replace(tiny_illada(), family="llada"), jax.random.key(3))
    source = write_illada(tmp_path / "illada", model)
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, source / "model.safetensors")
    assert hf.load(source).ff_out is None
    save_file(tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, source / "model.safetensors")
    with pytest.raises(InputError, match="lm_head.weight differs from the embedding"):
        hf.load(source)


# What this model cannot compute.


def test_unknown_options_are_refused_by_name_in_one_line():
    with pytest.raises(InputError) as error:
        hf.load(REFERENCE / "ckpt_d_options")
    for option in ("attention_layer_norm", "include_qkv_bias", "input_emb_norm", "scale_logits"):
        assert option in str(error.value)
    assert "\n" not in str(error.value)


LLADA_OPTIONS = dict(
    attention_layer_norm=True, include_qkv_bias=True, include_bias=True, bias_for_layer_norm=True, input_emb_norm=True,
    scale_logits=True, alibi=True, rope=False, activation_type="gelu", block_type="sequential", layer_norm_type="default",
    layer_norm_with_affine=False, block_group_size=3, rope_scaling={"type": "linear", "factor": 2.0}, clip_qkv=8.0,
    sliding_window=128, quantization_config={"bits": 4}, n_experts=8, model_type="llada_moe",
)  # fmt: skip
ILLADA_OPTIONS = dict(
    hidden_act="gelu", attention_bias=True, mlp_bias=True, layer_norm_eps=1e-5, head_dim=16, model_type="llama",
    rope_scaling={"rope_type": "default", "factor": 2.0}, rope_parameters={"rope_type": "yarn"}, qk_norm=True,
)  # fmt: skip


@pytest.mark.parametrize("option, value", LLADA_OPTIONS.items(), ids=LLADA_OPTIONS)
def test_every_option_that_changes_numbers_is_refused(tmp_path, option, value):
    with pytest.raises(InputError, match=option):
        hf.load(copy(A, tmp_path / "source", **{option: value}))


@pytest.mark.parametrize("option, value", ILLADA_OPTIONS.items(), ids=ILLADA_OPTIONS)
def test_every_option_of_illada_that_changes_numbers_is_refused(tmp_path, option, value):
    model = Transformer(dataclasses.replace(tiny_illada(), family="llada"), jax.random.key(3))
    with pytest.raises(InputError, match=option):
        hf.load(write_illada(tmp_path / "source", model, **{option: value}))


@pytest.mark.parametrize("option", ["rope", "block_type", "activation_type", "layer_norm_type"])
def test_an_absent_option_has_its_official_default(tmp_path, option):
    with pytest.raises(InputError, match=f"cannot compute {option}"):
        hf.load(copy(A, tmp_path / "source", **{option: ...}))


def test_rotation_in_bfloat16_is_refused_only_where_it_matters(tmp_path):
    with pytest.raises(InputError, match="rope_full_precision"):
        hf.load(copy(BF16, tmp_path / "source", rope_full_precision=False))
    assert hf.load(tmp_path / "source", "float32").config.dtype == "float32"


# Broken directories.

WRONG_FIELDS = [
    ({"d_model": ...}, "d_model is missing"), ({"n_layers": "3"}, 'n_layers is "3"'), ({"n_heads": -4}, "n_heads is -4"),
    ({"n_heads": True}, "n_heads is true"), ({"vocab_size": None}, "vocab_size is null"), ({"n_heads": 3}, "n_heads"),
    ({"rope_theta": 0}, "rope_theta is 0"), ({"rms_norm_eps": "small"}, "rms_norm_eps"), ({"n_kv_heads": 0}, "n_kv_heads"),
    ({"eos_token_id": ...}, "eos_token_id is missing"), ({"mask_token_id": 512}, "mask_token_id 512"),
    ({"mask_token_id": None}, "mask_token_id is missing"), ({"weight_tying": "no"}, 'weight_tying is "no"'),
    ({"model_type": "llama"}, "model_type 'llama'"), ({"model_type": ..., "architectures": ...}, "model_type 'missing'"),
    ({"multi_query_attention": True}, "contradicts multi_query_attention"), ({"vocab_size": 513}, "vocab_size 513"),
    ({"n_layers": 10**9}, "lacks model.transformer.blocks.3.attn_out.weight.* and 1 more"),
    ({"n_layers": 2}, "holds model.transformer.blocks.2.attn_norm.weight"),
    ({"weight_tying": True}, "model.transformer.ff_out.weight differs from the embedding"),
    ({"mlp_hidden_size": 128}, r"blocks.0.ff_out.weight has shape \(64, 160\), config.json makes it \(64, 128\)"),
    ({"n_kv_heads": 2}, r"k_proj.weight has shape \(64, 64\), config.json makes it \(32, 64\)"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", WRONG_FIELDS, ids=[str(changes) for changes, _ in WRONG_FIELDS])
def test_a_wrong_config_is_named(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as error:
        hf.load(copy(A, tmp_path / "source", **changes))
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b'{"model_type": ["llada"]}', b"[" * 100000])
def test_a_config_that_is_none_is_named(tmp_path, text):
    source = copy(A, tmp_path / "source")
    (source / "config.json").write_bytes(text)
    with pytest.raises(InputError, match="config.json"):
        hf.load(source)


def header(file, length=None):
    """(header as a dictionary, the bytes behind it) of a safetensors file."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file, change):
    told, rest = header(file)
    change(told)
    text = json.dumps(told).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def entry(name="model.transformer.ln_f.weight", **fields):
    return lambda told: told[name].update(fields)


def cut(file, count):
    file.write_bytes(file.read_bytes()[:count])


BROKEN_FILES = {
    "empty": (lambda f: cut(f, 0), "truncated"),
    "cut in the length": (lambda f: cut(f, 5), "truncated"),
    "cut in the header": (lambda f: cut(f, 100), "truncated"),
    "cut in the data": (lambda f: cut(f, 500_000), "truncated"),
    "cut by one byte": (lambda f: cut(f, -1), "truncated"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"\0"), "truncated or corrupt"),
    "a header of exabytes": (lambda f: f.write_bytes(b"\xff" * 7 + b"\x0f" + f.read_bytes()[8:]), "header of"),
    "a header of text": (lambda f: f.write_bytes(struct.pack("<Q", 10) + b"x" * 1000), "header is corrupt"),
    "a deep header": (lambda f: f.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5), "header is corrupt"),
    "a list for a header": (lambda f: f.write_bytes(struct.pack("<Q", 2) + b"[]"), "not an object"),
    "half floats": (
        lambda f: with_header(f, entry(dtype="F8_E4M3")),
        "has dtype F8_E4M3; supported are F32, BF16, F16",
    ),
    "integers": (lambda f: with_header(f, entry(dtype="I32")), "has dtype I32"),
    "no dtype": (lambda f: with_header(f, lambda told: told["model.transformer.ln_f.weight"].pop("dtype")), "ln_f"),
    "a huge shape": (lambda f: with_header(f, entry(shape=[2**40, 2**40])), "ln_f.weight: bytes"),
    "a negative shape": (lambda f: with_header(f, entry(shape=[-8, -8])), "ln_f"),
    "a fractional shape": (lambda f: with_header(f, entry(shape=[64.0])), "ln_f"),
    "an overlap": (lambda f: with_header(f, entry(data_offsets=[0, 256])), "header is corrupt"),
    "offsets beyond the file": (lambda f: with_header(f, entry(data_offsets=[2**50, 2**50 + 256])), "corrupt"),
    "an entry of text": (lambda f: with_header(f, lambda told: told.update({"model.x": "y"})), "tensor model.x"),
    "a tensor renamed": (
        lambda f: with_header(f, lambda t: t.update({"model.x": t.pop("model.transformer.ln_f.weight")})),
        "lacks model.transformer.ln_f.weight",
    ),
    "a tensor twice": (
        lambda f: f.write_bytes(f.read_bytes().replace(b"blocks.1.attn_norm", b"blocks.0.attn_norm")),
        "a name occurs twice",
    ),
}


@pytest.mark.parametrize("defect", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path, defect):
    source = copy(A, tmp_path / "source")
    damage, words = BROKEN_FILES[defect]
    damage(source / "model.safetensors")
    with pytest.raises(InputError, match=words) as error:
        hf.load(source)
    assert "\n" not in str(error.value) and str(source) in str(error.value)


def edit_index(change):
    def damage(d):
        index = json.loads((d / safetensors_io.INDEX).read_text())
        change(index["weight_map"])
        (d / safetensors_io.INDEX).write_text(json.dumps(index))

    return damage


SECOND = "model-00002-of-00004.safetensors"
WTE = "model.transformer.wte.weight"
BROKEN_DIRECTORIES = {
    "a missing shard": (lambda d: (d / SECOND).unlink(), f"{SECOND} is missing"),
    "a missing shard, no index": (
        lambda d: [(d / name).unlink() for name in (SECOND, safetensors_io.INDEX)], f"{SECOND} is missing",
    ),
    "a dead link": (lambda d: [(d / SECOND).unlink(), (d / SECOND).symlink_to("gone")], "link"),
    "no config.json": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "no files": (lambda d: [path.unlink() for path in d.glob("*.safetensors")], "no .safetensors"),
    "no directory": (shutil.rmtree, "no such directory"),
    "a file too many": (lambda d: shutil.copy(d / SECOND, d / "x.safetensors"), "x.safetensors is not among"),
    "a tensor in two files": (
        lambda d: [(d / safetensors_io.INDEX).unlink(), shutil.copy(d / SECOND, d / "x.safetensors")], "is in ",
    ),
    "an index of nothing": (lambda d: (d / safetensors_io.INDEX).write_text("{}"), "not an index"),
    "an index that is a list": (lambda d: (d / safetensors_io.INDEX).write_text("[]"), "not an index"),
    "an index of paths": (edit_index(lambda m: m.update({WTE: "../x.safetensors"})), r"\.\./x.safetensors is missing"),
    "an index that is wrong": (edit_index(lambda m: m.update({WTE: SECOND})), f"{WTE}, which .* puts in {SECOND}"),
    "an index with a name too many": (edit_index(lambda m: m.update({"model.x": SECOND})), "lists model.x"),
    "an index with a name too few": (edit_index(lambda m: m.pop(WTE)), f"{WTE}, which .* puts in no file"),
}  # fmt: skip


@pytest.mark.parametrize("defect", BROKEN_DIRECTORIES)
def test_a_broken_directory_is_named(tmp_path, defect):
    source = copy(SHARDED, tmp_path / "source")
    damage, words = BROKEN_DIRECTORIES[defect]
    damage(source)
    with pytest.raises(InputError, match=words) as error:
        hf.load(source)
    assert "\n" not in str(error.value)


def test_float16_is_loaded_only_as_something_else(tmp_path):
    source = copy(A, tmp_path / "source")
    halves = {name: x.astype(np.float16) for name, x in load_file(A / "model.safetensors").items()}
    save_file(halves, source / "model.safetensors")
    with pytest.raises(InputError, match="float16.*dtype float32"):
        hf.load(source)
    assert (hf.load(source, "float32").wte[...] == halves[WTE]).all()
    with pytest.raises(InputError, match="dtype 'float16' is not one of"):
        hf.load(source, "float16")


def test_mixed_dtypes_stay_as_they_are(tmp_path):
    source = copy(BF16, tmp_path / "source")
    tensors = load_torch(BF16 / "model.safetensors")
    mixed = {name: x.float() if "norm" in name or "ln_f" in name else x for name, x in tensors.items()}
    from safetensors.torch import save_file as save_torch

    save_torch(mixed, source / "model.safetensors", {"format": "pt"})
    model = hf.load(source)
    assert (model.ln_f.dtype, model.wte.dtype, model.config.dtype) == (torch_name(torch.float32), "bfloat16", "float32")
    hf.save_hf(model, tmp_path / "out", source_dir=source)
    same_files(source, tmp_path / "out")


def torch_name(dtype):
    return str(dtype).removeprefix("torch.")


# Saving that cannot be.


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    model = load("ckpt_a_mha")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for place in (tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(InputError, match="not an empty directory"):
            hf.save_hf(model, place)
    (tmp_path / "empty").mkdir()
    hf.save_hf(model, tmp_path / "empty")
    for size in ("5 apples", "-1GB", 0, ""):
        with pytest.raises(InputError, match="max_shard_size"):
            hf.save_hf(model, tmp_path / "new", size)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io.os, "fsync", fails)
    with pytest.raises(InputError, match="no space left"):
        hf.save_hf(model, tmp_path / "new")
    assert names_of(tmp_path) == ["empty", "full"]


def test_a_causal_model_has_no_published_format(tmp_path, tiny):
    model = Transformer(dataclasses.replace(tiny, causal=True), jax.random.key(0))
    with pytest.raises(InputError, match="causal"):
        hf.save_hf(model, tmp_path / "out")


def test_every_published_shape_has_its_names_and_config():
    manifest = dict(names=291, parameters=8_015_581_184)
    c = dataclasses.replace(PRESETS["llada_8b"], dtype="float32", remat="none")
    tensors = {t.name: t.shape for t in names.tensors(c)}
    assert len(tensors) == manifest["names"]
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == manifest["parameters"]
    for preset in ("llada_8b", "llada_1b", "illada_8b"):
        c = dataclasses.replace(PRESETS[preset], dtype="float32", remat="none")
        again = hf_config.read_config(hf_config.write_config(c, "float32"), "config.json", "float32", {})
        assert dataclasses.replace(again, published="") == c


# Workdirs and the command line.


def convert(*flags):
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["ckpt_b_gqa_tied", "ckpt_a_mha_bf16"])
def test_conversion_there_and_back_is_exact(tmp_path, name):
    source = copy(REFERENCE / name, tmp_path / "source")
    shutil.copy(REFERENCE / name / "config.json", source)
    shutil.copy(Path(__file__).parent / "golden" / "tokenizer" / "tokenizer.json", source)
    run, back = tmp_path / "run", tmp_path / "back"
    done = convert(f"--source={source}", f"--target={run}", "--to=orbax", "--verify")
    assert done.returncode == 0, done.stderr
    assert "those of the source" in done.stdout and names_of(run) == ["checkpoints", "config.json", "tokenizer"]
    model = hf.load(run)
    assert model.wte.dtype == jnp.float32 and model.config == hf.load(source).config
    assert hf.load(run, "bfloat16").config.dtype == "bfloat16"
    done = convert(f"--source={run}", f"--target={back}", "--to=hf", "--verify")
    assert done.returncode == 0, done.stderr
    same_files(source, back)


def test_conversion_tells_of_rounding_and_of_mistakes(tmp_path):
    done = convert(f"--source={A}", f"--target={tmp_path / 'out'}", "--to=hf", "--dtype=bfloat16", "--verify")
    assert done.returncode == 0 and "rounding moved logits" in done.stdout
    assert filecmp.cmp(BF16 / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for source, words in {A: "not an empty directory", tmp_path / "none": "no such directory"}.items():
        target = tmp_path / ("out" if source == A else "new")
        done = convert(f"--source={source}", f"--target={target}", "--to=hf")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert names_of(tmp_path) == ["out"]
