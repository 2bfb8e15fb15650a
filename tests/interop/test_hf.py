"""Published checkpoints: the official logits, files that come back byte for byte, meshes, conversion."""

import dataclasses
import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import REFERENCE, copy, load, names_of, tiny_illada, vectors, write_illada
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from llada_jax.fields import InputError
from llada_jax.interop import hf, hf_config, safetensors_io, tensor_names
from llada_jax.interop.workdir import abstract_model
from llada_jax.model.config import PRESETS
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.mesh import AXES, make_mesh
from llada_jax.tools import convert_checkpoint
from llada_jax.training import checkpoint

ROOT = Path(__file__).parents[2]

A, B, SHARDED, BF16 = (
    REFERENCE / name for name in ("ckpt_a_mha", "ckpt_b_gqa_tied", "ckpt_a_mha_sharded", "ckpt_a_mha_bf16")
)
CASES = {case: m for case, m in vectors("logits")[1].items() if m["ckpt"] != "ckpt_d_options"}


def same_files(a, b):
    assert names_of(a) == names_of(b)
    assert [n for n in names_of(a) if not filecmp.cmp(a / n, b / n, shallow=False)] == []


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
    sizes = {name: x.nbytes for name, x in load_file(A / "model.safetensors").items()}
    for path in (tmp_path / "out").glob("*.safetensors"):
        inside = [sizes[name] for name, t in stored.items() if t.path == path]
        assert sum(inside) <= 100_000 or len(inside) == 1
    index = json.loads((tmp_path / "out" / safetensors_io.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"]) == set(stored) == set(sizes)


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
    hf.save_hf(again, tmp_path / "twice", source_dir=tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink(missing_ok=True)  # the card is the first one's
    same_files(tmp_path / "out", tmp_path / "twice")


def test_config_json_stays_true_when_the_model_has_changed(tmp_path):
    model = hf.load(A, "bfloat16")
    like = abstract_model(dataclasses.replace(model.config, rope_theta=1e4, eos_token_id=3), None)
    model = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))
    hf.save_hf(model, tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (A, tmp_path / "out"))
    changed = {"torch_dtype": "bfloat16", "rope_theta": 1e4, "eos_token_id": 3}
    assert {k: v for k, v in after.items() if before[k] != v} == changed and set(before) == set(after)


def test_token_ids_that_config_json_lacks_come_from_the_tokenizer(tmp_path):
    assert hf.load(A).config.eot_token_id == 497  # there is no tokenizer beside it: EOS
    source = copy(A, tmp_path / "source")
    shutil.copy(Path(__file__).parents[1] / "golden" / "tokenizer" / "tokenizer.json", source)
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
    hf.save_hf(again, tmp_path / "back", source_dir=tmp_path / "nulls")
    (tmp_path / "nulls" / "README.md").unlink()  # the card of another model
    same_files(tmp_path / "nulls", tmp_path / "back")


# Meshes.


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 8, 1, 1), (1, 1, 2, 4)])
@pytest.mark.parametrize("name", ["ckpt_b_gqa_tied", "ckpt_a_mha_sharded"])
def test_a_model_is_born_sharded_and_saved_from_shards(tmp_path, sizes, name):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
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


# Others.


def test_mixed_dtypes_stay_as_they_are(tmp_path):
    source = copy(BF16, tmp_path / "source")
    tensors = load_torch(BF16 / "model.safetensors")
    mixed = {name: x.float() if "norm" in name or "ln_f" in name else x for name, x in tensors.items()}
    save_torch(mixed, source / "model.safetensors", {"format": "pt"})
    model = hf.load(source)
    assert (model.ln_f.dtype, model.wte.dtype, model.config.dtype) == ("float32", "bfloat16", "float32")
    hf.save_hf(model, tmp_path / "out", source_dir=source)
    same_files(source, tmp_path / "out")


def test_every_published_shape_has_its_names_and_config():
    manifest = dict(names=291, parameters=8_015_581_184)
    c = dataclasses.replace(PRESETS["llada_8b"], dtype="float32", remat="none")
    tensors = {t.name: t.shape for t in tensor_names.tensors(c)}
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
    shutil.copy(Path(__file__).parents[1] / "golden" / "tokenizer" / "tokenizer.json", source)
    run, back = tmp_path / "run", tmp_path / "back"
    said = convert_checkpoint.convert(source, run, "orbax", None, "5GB", verify=True)
    assert "those of the source" in said and "PyTorch computes the same from the source, within" in said
    assert names_of(run) == ["checkpoints", "config.json", "tokenizer"]
    model = hf.load(run)
    assert model.wte.dtype == hf.load(source).wte.dtype and model.config == hf.load(source).config
    for dtype in ("float32", "bfloat16"):
        assert hf.load(run, dtype).wte.dtype == hf.load(run, dtype).config.dtype == dtype
    said = convert_checkpoint.convert(run, back, "hf", None, "5GB", verify=True)
    assert "those of the source" in said and "PyTorch computes the same from the target, within" in said
    same_files(source, back)


def test_a_workdir_is_read_by_the_parameter_the_large_ones_first(tmp_path, monkeypatch):
    hf.save_workdir(hf.load(BF16), tmp_path / "run")
    read, load_some = [], checkpoint.ocp.load_checkpointables

    def spy(place, like):
        read.append([(x.size, x.dtype) for x in like["model"].values()])
        return load_some(place, like)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", spy)
    model = hf.load(tmp_path / "run")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model, hf.load(BF16)))
    assert [len(some) for some in read] == [1] * len(jax.tree.leaves(model))
    assert read == sorted(read, key=lambda some: -some[0][0]) and {some[0][1].name for some in read} == {"bfloat16"}


@pytest.mark.slow
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
