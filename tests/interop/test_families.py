"""A family of published checkpoints is one file and one line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from reference import names_of
from safetensors.numpy import load_file

from llada_jax.fields import InputError
from llada_jax.interop import families, hf
from llada_jax.interop.families import FAMILIES
from llada_jax.interop.families.family import Family
from llada_jax.model.config import PRESETS
from llada_jax.model.transformer import Transformer
from llada_jax.training import run

TOY = Family(
    architecture="ToyLM",
    preset="tiny",
    names={
        "ff_out": "out",
        "blocks.attn_norm": "l{}.n1", "blocks.q_proj": "l{}.q", "blocks.k_proj": "l{}.k", "blocks.v_proj": "l{}.v",
        "blocks.attn_out": "l{}.o", "blocks.ff_norm": "l{}.n2", "blocks.ff_proj": "l{}.g", "blocks.up_proj": "l{}.u",
        "blocks.ff_out": "l{}.d",
        "ln_f": "n", "wte": "in",
    },
    keys={
        "d_model": "width", "n_layers": "depth", "n_heads": "heads", "n_kv_heads": "groups", "mlp_hidden_size": "inner",
        "vocab_size": "rows", "embedding_size": "padded", "max_sequence_length": "context", "rope_theta": "theta",
        "rms_norm_eps": "eps", "weight_tying": "tied", "mask_token_id": "mask", "eos_token_id": "eos",
    },
    defaults=dict(tied=False, groups=None),
    nullable=("groups",),
    computed={"act": ("silu",)},
    fresh=dict(act="silu"),
    mask_token_id=9,
    head_size_key="size_of_head",
)  # fmt: skip


@pytest.fixture
def saved(monkeypatch, tiny, tmp_path):
    """(model, directory of its published checkpoint) of a family that only this file knows."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    model = Transformer(dataclasses.replace(tiny, family="toy", mask_token_id=3), jax.random.key(0))
    hf.save_hf(model, tmp_path / "out", "10KB")
    return model, tmp_path / "out"


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))


def test_a_new_family_is_saved_under_its_names_and_loaded_again(saved):
    model, directory = saved
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    wanted = {"out", "n", "in", *(f"l{i}.{name}" for i in range(2) for name in "n1 q k v o n2 g u d".split())}
    assert set(tensors) == wanted
    np.testing.assert_array_equal(tensors["l1.o"], np.asarray(model.blocks.attn_out[1]).reshape(32, 32))
    fields = json.loads((directory / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"], fields["act"]) == (["ToyLM"], "toy", "silu")
    assert (fields["width"], fields["groups"], fields["mask"]) == (32, 2, 3)
    again = hf.load(directory)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    hf.save_hf(again, directory.parent / "twice", "10KB", source_dir=directory)
    for name in names_of(directory):
        assert (directory / name).read_bytes() == (directory.parent / "twice" / name).read_bytes()


def test_what_a_new_family_says_of_its_config_is_obeyed(saved):
    _, directory = saved
    edit(directory, mask=..., model_type=...)  # then the architecture says which it is
    c = hf.load_config(directory)
    assert (c.family, c.mask_token_id, c.weight_tying, c.init) == ("toy", 9, False, "normal")
    edit(directory, groups=None)
    assert hf.load_config(directory).n_kv_heads == 4
    for changes, words in [
        (dict(act="gelu"), "cannot compute act"), (dict(size_of_head=16), r"size_of_head 16 \(only width / heads\)"),
        (dict(width=...), "width is missing"), (dict(inner=None), "inner is null"), (dict(eos=...), "eos is missing"),
    ]:  # fmt: skip
        text = (directory / "config.json").read_text()
        edit(directory, **changes)
        with pytest.raises(InputError, match=words):
            hf.load_config(directory)
        (directory / "config.json").write_text(text)


def test_every_family_names_every_parameter_and_a_preset():
    parameters = set(FAMILIES["llada"].names)
    for family in FAMILIES.values():
        assert set(family.names) == parameters and family.preset in PRESETS
        assert len(set(family.names.values())) == len(parameters)


def test_an_unknown_family_is_refused_before_a_run_starts_and_when_it_is_saved(tmp_path, tiny, tiny_run):
    assert families.require("illada") is FAMILIES["illada"]
    tiny_run.model.family = "lama"
    with pytest.raises(InputError, match="config.model.family 'lama' is not one of llada, illada"):
        run.check(tiny_run, 8)
    model = Transformer(dataclasses.replace(tiny, family="lama"), jax.random.key(0))
    with pytest.raises(InputError, match="'lama' is not one of"):
        hf.save_hf(model, tmp_path / "out")
    assert names_of(tmp_path) == []
