"""Published checkpoints that are broken or of another model, and places that cannot be written: one clear line."""

import contextlib
import dataclasses
import json
import os
import shutil
import struct
import threading
import time

import jax
import numpy as np
import pytest
from reference import REFERENCE, copy, load, names_of, tiny_illada, write_illada
from safetensors.numpy import load_file, save_file

from llada_jax.fields import InputError
from llada_jax.interop import hf, hf_config, safetensors_io, workdir
from llada_jax.model.transformer import Transformer

A, SHARDED, BF16 = (REFERENCE / name for name in ("ckpt_a_mha", "ckpt_a_mha_sharded", "ckpt_a_mha_bf16"))

# What this model cannot compute.


def test_unknown_options_are_refused_by_name_in_one_line():
    with pytest.raises(InputError) as error:
        hf.load(REFERENCE / "ckpt_d_options")
    for option in ("attention_layer_norm", "include_qkv_bias", "input_emb_norm", "scale_logits"):
        assert option in str(error.value)
    assert "\n" not in str(error.value)


LLADA_OPTIONS = dict(
    attention_layer_norm=True, include_qkv_bias=True, include_bias=True, bias_for_layer_norm=True, input_emb_norm=True,
    scale_logits=True, alibi=True, rope=False, activation_type="gelu", block_type="sequential",
    layer_norm_type="default",
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
    ({"d_model": ...}, "d_model is missing"), ({"n_layers": "3"}, 'n_layers is "3"'),
    ({"n_heads": -4}, "n_heads is -4"),
    ({"n_heads": True}, "n_heads is true"), ({"vocab_size": None}, "vocab_size is null"), ({"n_heads": 3}, "n_heads"),
    ({"rope_theta": 0}, "rope_theta is 0"), ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"n_kv_heads": 0}, "n_kv_heads"),
    ({"eos_token_id": ...}, "eos_token_id is missing"), ({"mask_token_id": 512}, "mask_token_id 512"),
    ({"mask_token_id": None}, "mask_token_id is missing"), ({"weight_tying": "no"}, 'weight_tying is "no"'),
    ({"model_type": "llama"}, "model_type 'llama'"),
    ({"model_type": ..., "architectures": ...}, "model_type 'missing'"),
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


def deep(file, levels):
    text = b'{"model.x":' + b"[" * levels + b"]" * levels + b"}"
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def cut(file, count):
    file.write_bytes(file.read_bytes()[:count])


def replaced(file, kind):
    """Puts something that is no such file in its place."""
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    if kind == "directory":
        file.mkdir()
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "nested":
        file.write_text('{"a":' * 10**5)
    else:
        file.symlink_to({"device": "/dev/zero", "dead link": "gone"}[kind])


CORRUPT = "not a safetensors file, truncated or corrupt"
BROKEN_FILES = {
    "empty": (lambda f: cut(f, 0), CORRUPT),
    "cut in the length": (lambda f: cut(f, 5), CORRUPT),
    "cut in the header": (lambda f: cut(f, 100), CORRUPT),
    "cut in the data": (lambda f: cut(f, 500_000), CORRUPT),
    "cut by one byte": (lambda f: cut(f, -1), CORRUPT),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"\0"), CORRUPT),
    "a header of exabytes": (lambda f: f.write_bytes(b"\xff" * 7 + b"\x0f" + f.read_bytes()[8:]), CORRUPT),
    "a header of text": (lambda f: f.write_bytes(struct.pack("<Q", 10) + b"x" * 1000), CORRUPT),
    "a deep header": (lambda f: f.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5), CORRUPT),
    "a deep entry": (lambda f: deep(f, 10**5), CORRUPT),
    "a list for a header": (lambda f: f.write_bytes(struct.pack("<Q", 2) + b"[]"), CORRUPT),
    "one-byte floats": (
        lambda f: with_header(f, entry(dtype="F8_E4M3", shape=[256])),
        "has dtype F8_E4M3; supported are F32, BF16, F16",
    ),
    "integers": (lambda f: with_header(f, entry(dtype="I32")), "has dtype I32"),
    "half the bytes": (lambda f: with_header(f, entry(dtype="BF16")), CORRUPT),
    "an unknown dtype": (lambda f: with_header(f, entry(dtype="F33")), CORRUPT),
    "no dtype": (lambda f: with_header(f, lambda told: told["model.transformer.ln_f.weight"].pop("dtype")), CORRUPT),
    "a huge shape": (lambda f: with_header(f, entry(shape=[2**40, 2**40])), CORRUPT),
    "a negative shape": (lambda f: with_header(f, entry(shape=[-8, -8])), CORRUPT),
    "a fractional shape": (lambda f: with_header(f, entry(shape=[64.0])), CORRUPT),
    "a shape of 70 axes": (lambda f: with_header(f, entry(shape=[64, *[1] * 69])), "ln_f.weight has shape"),
    "an overlap": (lambda f: with_header(f, entry(data_offsets=[0, 256])), CORRUPT),
    "offsets beyond the file": (lambda f: with_header(f, entry(data_offsets=[2**50, 2**50 + 256])), CORRUPT),
    "an entry of text": (lambda f: with_header(f, lambda told: told.update({"model.x": "y"})), CORRUPT),
    "a tensor renamed": (
        lambda f: with_header(f, lambda t: t.update({"model.x": t.pop("model.transformer.ln_f.weight")})),
        "lacks model.transformer.ln_f.weight",
    ),
    "a tensor of a name of lines": (
        lambda f: with_header(f, lambda t: t.update({"a\nb" * 999: dict(dtype="F32", shape=[0], data_offsets=[0, 0])})),
        "holds a ba ba b",
    ),
    "a tensor twice": (
        lambda f: f.write_bytes(f.read_bytes().replace(b"blocks.1.attn_norm", b"blocks.0.attn_norm")), CORRUPT,
    ),
    "a directory": (lambda f: replaced(f, "directory"), "not a file"),
    "a FIFO": (lambda f: replaced(f, "FIFO"), "not a file"),
    "a device": (lambda f: replaced(f, "device"), "not a file"),
}  # fmt: skip


@pytest.mark.parametrize("defect", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path, defect):
    source = copy(A, tmp_path / "source")
    damage, words = BROKEN_FILES[defect]
    damage(source / "model.safetensors")
    with pytest.raises(InputError, match=words) as error:
        hf.load(source)
    assert "\n" not in str(error.value) and str(source) in str(error.value) and len(str(error.value)) < 1000


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
    **{
        f"a {kind} for an index": (lambda d, kind=kind: replaced(d / safetensors_io.INDEX, kind), "index.json: not a")
        for kind in ("directory", "FIFO", "device", "dead link")
    },
    "a deep index": (lambda d: (d / safetensors_io.INDEX).write_text('{"weight_map":' * 10**5), "not an index"),
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
    for place in (tmp_path / "new", tmp_path / "new" / "and" / "deep"):
        with pytest.raises(InputError, match=f"{place.name}: no space left"):
            hf.save_hf(model, place)
    with pytest.raises(InputError, match="cannot be written .File name too long"):
        hf.save_hf(model, tmp_path / ("x" * 300))
    assert names_of(tmp_path) == ["empty", "full"]


def test_what_orbax_writes_after_it_has_failed_goes_too(tmp_path, monkeypatch):
    place = tmp_path / "new" / "run"

    def fails(orbax, *_):
        def write_on():
            for _ in range(5):
                time.sleep(0.1)
                with contextlib.suppress(OSError):  # it is being removed
                    (orbax.directory / "0" / "late").mkdir(parents=True, exist_ok=True)

        threading.Thread(target=write_on).start()
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 8 bytes: No space left on device")

    monkeypatch.setattr(workdir.ocp.training.Checkpointer, "save_checkpointables", fails)
    with pytest.raises(InputError, match="run: no space left on device; free some"):
        hf.save_workdir(load("ckpt_a_mha"), place)
    assert names_of(tmp_path) == []


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(InputError, match="out: was made by something else"), hf.new_directory(tmp_path / "out") as made:
        (made / "ours").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names_of(tmp_path) == ["out"] and names_of(tmp_path / "out") == ["theirs"]


def edit_config(**changes):
    def damage(d):
        config = json.loads((d / "config.json").read_text())
        config["model"] |= changes
        (d / "config.json").write_text(json.dumps(config))

    return damage


def without_checksums(change):
    return lambda d: [(d / "checkpoints" / "0" / "checksums.json").unlink(), change(d)]


def cut_parameter(d):
    cut(next(p for p in (d / "checkpoints/0/model/blocks.q_proj").rglob("0") if p.is_file()), 9)


BROKEN_WORKDIRS = {
    "a parameter cut": (cut_parameter, "step 0 is damaged .model/blocks.q_proj/.* has 9 bytes, not"),
    "a parameter cut, no checksums": (without_checksums(cut_parameter), "0: damaged"),
    "no metadata, no checksums": (
        without_checksums(lambda d: (d / "checkpoints/0/model/_METADATA").unlink()), "0: holds no model",
    ),
    "no model": (lambda d: shutil.rmtree(d / "checkpoints/0/model"), "0 is damaged .holds no model"),
    "no step": (lambda d: shutil.rmtree(d / "checkpoints/0"), "no complete checkpoint"),
    "no checkpoints": (lambda d: shutil.rmtree(d / "checkpoints"), "no checkpoints/ in it"),
    "another shape": (edit_config(mlp_hidden_size=128), r"makes blocks.ff_out \(3, 64, 128\), .* \(3, 64, 160\)"),
    "a head": (edit_config(weight_tying=False), "makes ff_out .* holds none"),
    "a field of text": (edit_config(d_model="x"), "d_model is 'x'; it must be a whole number"),
    "a field unknown": (edit_config(depth=3), "config.model.depth: no such field"),
    "no group": (lambda d: (d / "config.json").write_text('{"model": 3}'), "config.model is 3"),
}  # fmt: skip


@pytest.mark.parametrize("defect", BROKEN_WORKDIRS)
def test_a_broken_workdir_is_named(tmp_path, tiny, defect):
    model = load("ckpt_a_mha")
    if defect == "a head":
        model = Transformer(dataclasses.replace(tiny, weight_tying=True), jax.random.key(0))
    hf.save_workdir(model, tmp_path / "run")
    damage, words = BROKEN_WORKDIRS[defect]
    damage(tmp_path / "run")
    with pytest.raises(InputError, match=words) as error:
        hf.load(tmp_path / "run")
    assert "\n" not in str(error.value)


KINDS = ["directory", "FIFO", "device", "dead link", "nested"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, name, kind):
    source = copy(A, tmp_path / "source")
    replaced(source / name, kind)
    with pytest.raises(InputError, match=f"source/{name}: not (a file|valid JSON)"):
        hf.load(source)
    hf.save_workdir(load("ckpt_a_mha"), tmp_path / "run")
    if name == "config.json":
        replaced(tmp_path / "run" / name, kind)
        with pytest.raises(InputError, match=f"run/{name}: not (a file|valid JSON)"):
            hf.load(tmp_path / "run")


@pytest.mark.parametrize("depth", [10, 90, 500, *range(900, 1000, 5), 2000])
def test_a_config_nested_however_deep_is_carried_or_refused(tmp_path, depth):
    text = (A / "config.json").read_text().rstrip().removesuffix("}")
    for key in ("x", "d_model", "rope_scaling"):
        where = f"{key} in config.json"
        try:
            c = hf_config.read_config(f'{text}, "{key}": {"[" * depth}{"]" * depth}}}', where, "float32", {})
            assert key == "x" and depth < 100
            changed = hf_config.write_config(dataclasses.replace(c, rope_theta=3.0), "float32")
            assert json.loads(changed)["rope_theta"] == 3
        except InputError as error:
            assert str(error).startswith(where) and "\n" not in str(error) and len(str(error)) < 500
            assert key != "x" or depth > 90


WRONG_TOKENS = [
    {"content": "<|eot_id|>", "id": 4294967295}, {"content": "other", "id": 2**31}, {"content": "x", "id": -1},
    {"content": "<|eot_id|>", "id": 1e400}, {"content": "x", "id": True}, {"content": "x", "id": "7"}, {"id": 7},
    {"content": ["x"], "id": 7}, {"content": "x"}, 7, None, "x", [],
]  # fmt: skip


@pytest.mark.parametrize("token", WRONG_TOKENS, ids=str)
def test_an_impossible_token_of_tokenizer_json_is_blamed_on_that_file(tmp_path, token):
    source = copy(A, tmp_path / "source", eot_token_id=...)
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<|eot_id|>", "id": 3}, token]}))
    with pytest.raises(InputError, match="tokenizer.json: added_tokens "):
        hf.load(source)


@pytest.mark.parametrize("place", ["x" * 300, "a\0b", "/etc/passwd/x", "/proc/x/y", "/dev/zero"])
def test_a_place_that_cannot_be_is_named(tmp_path, place):
    model = load("ckpt_b_gqa_tied")
    for act in (hf.load, hf.load_config, lambda p: hf.save_hf(model, p), lambda p: hf.save_workdir(model, p)):
        with pytest.raises(InputError, match="no such directory|cannot be written|not an empty directory"):
            act(place)
    with pytest.raises(InputError, match="source_dir .*no such directory"):
        hf.save_hf(model, tmp_path / "out", source_dir=place)
    assert names_of(tmp_path) == []


def test_a_published_checkpoint_may_have_a_path_that_is_not_utf8(tmp_path):
    source, target = (tmp_path / os.fsdecode(name) for name in (b"m\xff", b"\xfe\xfd"))
    copy(SHARDED, source)
    hf.save_hf(hf.load(source), target, "215KB", source_dir=source)
    assert names_of(target) == names_of(SHARDED)


def test_a_mesh_of_other_axes_is_refused():
    for mesh in (jax.make_mesh((8,), ("x",)), "fsdp=8"):
        with pytest.raises(InputError, match="mesh must have the explicit axes data, fsdp, tensor, context"):
            hf.load(A, mesh=mesh)


def test_a_causal_model_has_no_published_format(tmp_path, tiny):
    model = Transformer(dataclasses.replace(tiny, causal=True), jax.random.key(0))
    with pytest.raises(InputError, match="causal"):
        hf.save_hf(model, tmp_path / "out")
