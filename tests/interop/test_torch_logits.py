"""The second reading of published files, by PyTorch alone; and --verify, which holds it against ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import REFERENCE, load, names_of, tiny_illada, vectors, write_illada

from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.interop.families import FAMILIES
from llada_jax.model.transformer import Transformer
from llada_jax.tools import convert_checkpoint, torch_logits

A = REFERENCE / "ckpt_a_mha"
ARRAYS, MADE = vectors("logits")
HIDING = {"attention_mask", "attention_bias"}
CASES = {
    case: m["ckpt"]
    for case, m in MADE.items()
    if m["dtype"] == "fp32" and m["ckpt"] != "ckpt_d_options" and not HIDING & set(ARRAYS[case])
}


@pytest.mark.parametrize("case", CASES)
def test_its_logits_are_the_official_ones(case):
    wanted = ARRAYS[case]["logits"]
    found = torch_logits.logits(REFERENCE / CASES[case], ARRAYS[case]["input_ids"])
    assert np.abs(found - wanted).max() <= 5e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("tie", [True, False])
def test_it_reads_the_names_of_illada(tmp_path, tie):
    model = Transformer(dataclasses.replace(tiny_illada(tie), family="llada"), jax.random.key(3))
    tokens = np.arange(48).reshape(2, 24)
    found = torch_logits.logits(write_illada(tmp_path / "illada", model), tokens)
    np.testing.assert_allclose(found, model(jnp.asarray(tokens)), atol=1e-6 * np.abs(found).max(), rtol=0)


def test_the_probe_of_verify_is_the_model_in_float32():
    model = hf.load(REFERENCE / "ckpt_a_mha_bf16")
    tokens = convert_checkpoint.random_tokens(model.config)
    wanted = hf.load(REFERENCE / "ckpt_a_mha_bf16", "float32")(jnp.asarray(tokens))
    np.testing.assert_allclose(convert_checkpoint.probe(model, tokens), wanted, atol=2e-4, rtol=0)


def convert(source, target, to, dtype=None):
    return convert_checkpoint.convert(source, target, to, dtype, "5GB", verify=True)


def test_verify_reads_both_sides_where_both_are_published_and_one_is_rounded(tmp_path):
    said = convert(A, tmp_path / "out", "hf", "bfloat16")
    assert "rounding moved logits" in said and "from the source and target, within" in said
    assert "put configuration_llada.py and modeling_llada.py of the published model beside them" in said


def test_a_mistake_that_reading_and_writing_share_is_found_by_pytorch(tmp_path, monkeypatch):
    hf.save_workdir(load("ckpt_a_mha"), tmp_path / "run")
    assert "no published files to compare with PyTorch" in convert(tmp_path / "run", tmp_path / "copy", "orbax")
    family, (q, k) = FAMILIES["llada"], ("blocks.q_proj", "blocks.k_proj")
    exchanged = {**family.names, q: family.names[k], k: family.names[q]}
    monkeypatch.setitem(FAMILIES, "llada", dataclasses.replace(family, names=exchanged))
    with pytest.raises(InputError, match="PyTorch computes other logits from the target"):
        convert(tmp_path / "run", tmp_path / "out", "hf")
    with pytest.raises(InputError, match="PyTorch computes other logits from the source"):
        convert(A, tmp_path / "out", "orbax")
    assert names_of(tmp_path) == ["copy", "run"]
    monkeypatch.setattr(convert_checkpoint.importlib.util, "find_spec", lambda _: None)
    assert "not compared with PyTorch, which is not installed" in convert(A, tmp_path / "out", "orbax")
