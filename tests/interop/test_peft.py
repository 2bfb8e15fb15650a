"""Adapter directories: those of PEFT read here, and ours read by PEFT."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import REFERENCE
from safetensors.numpy import load_file, save_file
from torch import nn

import llada_jax
from llada_jax.config import Lora
from llada_jax.fields import InputError
from llada_jax.interop import hf, peft
from llada_jax.interop.workdir import named_leaves
from llada_jax.model import lora, quantize
from llada_jax.model.config import ModelConfig
from llada_jax.model.transformer import Transformer
from llada_jax.tools import torch_step

BASE = REFERENCE / "ckpt_a_mha"
ADAPTERS = REFERENCE / "lora"
IDS = load_file(ADAPTERS / "lora.safetensors")["adapter_0_ids"].astype(np.int32)


def load(directory, **options):
    return hf.load(BASE, adapter=directory, **options)


class TorchModel(nn.Module):
    """The official names over the plain PyTorch model, for PEFT to find its targets in."""

    def __init__(self):
        super().__init__()
        model = hf.load(BASE)
        self.model = nn.Module()
        self.model.transformer = torch_step.Model(model.config)
        tensors = load_file(BASE / "model.safetensors")
        self.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})

    def forward(self, input_ids):
        return self.model.transformer(input_ids)

    def prepare_inputs_for_generation(self):
        raise NotImplementedError  # PEFT asks whether there is one


def torch_logits(model) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(IDS).long()).numpy()


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=tolerance * np.abs(b).max())


def fresh_adapter(**changes):
    """A model with an adapter of random numbers on every target."""
    c = Lora(**dict(rank=4, alpha=6.0, dropout=0.1, targets=lora.TARGETS) | changes)
    model = lora.attach(hf.load(BASE), c, jax.random.key(0))
    made = lora.adapters_of(model)
    for i, (name, a) in enumerate(made.items()):
        A, B = (jax.random.normal(jax.random.key(2 * i + j), x.shape) * 0.05 for j, x in enumerate((a.A, a.B)))
        made[name] = lora.Adapter(A, B, a.scale[...], a.rate)
    return lora.with_adapters(model, made)


def test_what_was_read_is_written_again_to_the_bit(tmp_path):
    for case in ("adapter_0", "adapter_1"):
        llada_jax.save_adapter(load(ADAPTERS / case), tmp_path / case)
        theirs, ours = (load_file(place / case / peft.WEIGHTS) for place in (ADAPTERS, tmp_path))
        assert theirs.keys() == ours.keys()
        for name, x in theirs.items():
            np.testing.assert_array_equal(ours[name], x)
        fields = [json.loads((place / case / peft.CONFIG).read_text()) for place in (ADAPTERS, tmp_path)]
        for name in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "fan_in_fan_out"):
            assert fields[0][name] == fields[1][name]


def test_peft_computes_the_same_from_our_directory(tmp_path):
    from peft import PeftModel

    model = fresh_adapter()
    llada_jax.save_adapter(model, tmp_path / "made", base=BASE)
    theirs = torch_logits(PeftModel.from_pretrained(TorchModel(), str(tmp_path / "made")))
    close(model(IDS), theirs)
    assert np.abs(theirs - torch_logits(TorchModel())).max() > 1e-2 * np.abs(theirs).max()


def test_we_compute_the_same_from_a_directory_of_peft(tmp_path):
    """Ranks and scales that differ by layer, layers without an adapter, an embedding, rank-stabilised scales."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False, target_modules=["q_proj", "up_proj", "wte"],
        rank_pattern={"blocks.1.q_proj": 6}, alpha_pattern={"up_proj": 2}, lora_dropout=0.25,
    )  # fmt: skip
    theirs = get_peft_model(TorchModel(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model = load(tmp_path / "theirs")
    close(model(IDS), torch_logits(theirs))
    assert model.blocks.lora["q_proj"].A.shape[:2] == (3, 6) and model.blocks.lora["q_proj"].rate == 0.25
    llada_jax.save_adapter(model, tmp_path / "again")
    close(load(tmp_path / "again")(IDS), np.asarray(model(IDS)), 1e-6)
    a, b = (load_file(tmp_path / name / peft.WEIGHTS) for name in ("theirs", "again"))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_several_adapters_on_one_base_add_up_and_are_written_as_one(tmp_path):
    llada_jax.save_adapter(fresh_adapter(targets=("wte", "k_proj"), alpha=1.0), tmp_path / "second")
    both = load([ADAPTERS / "adapter_0", tmp_path / "second"])
    alone = [load(place) for place in (ADAPTERS / "adapter_0", tmp_path / "second")]
    merged, *parts = (np.asarray(lora.merge(model)[0].blocks.k_proj[...]) for model in (both, *alone))
    close(merged, parts[0] + parts[1] - np.asarray(hf.load(BASE).blocks.k_proj[...]), 1e-6)
    llada_jax.save_adapter(both, tmp_path / "both")
    close(load(tmp_path / "both")(IDS), np.asarray(both(IDS)), 1e-5)


def test_an_adapter_knows_its_base_however_that_is_sharded(tmp_path):
    llada_jax.save_adapter(load(ADAPTERS / "adapter_0"), tmp_path / "made", base=BASE)
    hf.load(REFERENCE / "ckpt_a_mha_sharded", adapter=tmp_path / "made")
    tensors = load_file(BASE / "model.safetensors")
    shutil.copytree(BASE, tmp_path / "other")
    name = "model.transformer.blocks.2.ff_out.weight"
    save_file(tensors | {name: tensors[name] * 1.01}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="another model than .*other"):
        hf.load(tmp_path / "other", adapter=tmp_path / "made")
    llada_jax.save_adapter(load(ADAPTERS / "adapter_0"), tmp_path / "unnamed")
    hf.load(tmp_path / "other", adapter=tmp_path / "unnamed")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(peft_type="IA3"), "peft_type"),
        (dict(bias="all"), "bias"),
        (dict(modules_to_save=["wte"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "pissa"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out"),
        (dict(r=8), "rank 4, adapter_config.json makes it 8"),
        (dict(lora_alpha=0), "lora_alpha"),
        (dict(lora_alpha="8"), "lora_alpha"),
        (dict(lora_dropout=1), "lora_dropout"),
        (dict(rank_pattern={"(": 4}), "no regular expression"),
        (dict(alpha_pattern=[3]), "alpha_pattern"),
    ],
)
def test_whatever_is_not_plain_lora_is_refused(tmp_path, changes, message):
    shutil.copytree(ADAPTERS / "adapter_0", tmp_path / "made")
    place = tmp_path / "made" / peft.CONFIG
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "made")


_BLOCK, _HEAD = (f"base_model.model.model.transformer.{name}." for name in ("blocks.{}.q_proj", "ff_out"))
_A, _B = "lora_A.weight", "lora_B.weight"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({_BLOCK.format(0) + _B: None}, "lacks .*blocks.0.q_proj.lora_B.weight"),
        ({_BLOCK.format(3) + _A: (4, 64)}, "no place"),
        ({_BLOCK.format(0) + _A: (4, 63)}, r"\(4, 63\)"),
        ({_HEAD + _A: (4, 64), _HEAD + _B: (512, 4)}, "adapter of the head"),
        ({}, "holds no adapter"),
    ],
    ids=["half", "layer", "shape", "head", "empty"],
)
def test_tensors_that_have_no_place_are_refused(tmp_path, changes, message):
    shutil.copytree(ADAPTERS / "adapter_0", tmp_path / "made")
    tensors = load_file(ADAPTERS / "adapter_0" / peft.WEIGHTS) if changes else {}
    for name, shape in changes.items():
        tensors[name] = np.ones(shape or 0, np.float32)
    tensors = {name: x for name, x in tensors.items() if x.size}
    save_file(tensors, tmp_path / "made" / peft.WEIGHTS)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "made")


def test_models_that_a_format_cannot_express_are_refused(tmp_path):
    with pytest.raises(InputError, match="no adapters"):
        llada_jax.save_adapter(hf.load(BASE), tmp_path / "made")
    with pytest.raises(InputError, match="save_adapter"):
        llada_jax.save_hf(load(ADAPTERS / "adapter_0"), tmp_path / "made")
    with pytest.raises(InputError, match="quantised"):
        llada_jax.save_hf(hf.load(BASE, quantize="int8"), tmp_path / "made")
    with pytest.raises(InputError, match="quantize 'int3'"):
        hf.load(BASE, quantize="int3")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name, kind", [("ckpt_a_mha_bf16", "int8"), ("ckpt_b_gqa_tied", "int8"), ("ckpt_b_gqa_tied", "int4")]
)
def test_weights_are_quantised_in_the_stream_as_in_memory(name, kind):
    wanted = jax.jit(quantize.quantize, static_argnums=1)(hf.load(REFERENCE / name), kind)
    found = hf.load(REFERENCE / name, quantize=kind)
    for (leaf, x), (_, y) in zip(named_leaves(found), named_leaves(wanted), strict=True):
        steps = np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32))
        most = 1 if leaf.endswith(".values") else 0  # a quotient may be rounded otherwise at a half
        assert steps.max() <= most and np.mean(steps > 0) < 1e-3, leaf


def test_quantising_in_the_stream_holds_the_quantised_model_and_less_than_a_tensor_more(tmp_path):
    """NumPy holds int4 in bytes, so that there one parameter is held so beside the others, which JAX packs."""
    c = ModelConfig(
        d_model=512, n_layers=4, n_heads=8, n_kv_heads=8, mlp_hidden_size=8192, vocab_size=64, embedding_size=64,
        mask_token_id=3, bos_token_id=1, eos_token_id=2, pad_token_id=2, eot_token_id=6,
    )  # fmt: skip
    like = jax.eval_shape(lambda key: Transformer(c, key), jax.random.key(0))
    hf.save_hf(jax.tree.map(lambda x: jnp.full(x.shape, 0.5, jnp.bfloat16), like), tmp_path / "made")

    def loaded(kind):
        tracemalloc.start()
        try:
            model = hf.load(tmp_path / "made", quantize=kind)
            return model, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    model, peak = loaded("int8")
    own = sum(x.nbytes for x in jax.tree.leaves(model))
    assert own < peak + 2**20 and peak < own + 2 * 512 * 8192
    _, peak = loaded("int4")
    assert 4 * 512 * 8192 < peak < 0.5 * own + 2 * 512 * 8192


@pytest.mark.slow
def test_a_base_in_few_bits_keeps_the_elbo_and_most_greedy_tokens(rng):
    """Of a trained checkpoint: int8 moves the bound by no more than bfloat16 does, with room for the draw."""
    place = REFERENCE / "ckpt_e_train"
    model, narrow = hf.load(place), hf.load(place, "bfloat16")
    coded, short = (hf.load(place, quantize=kind) for kind in ("int8", "int4"))
    prompt, answer = rng.integers(7, 100, 5), rng.integers(7, 100, 8)
    wanted, rounded, found, coarse = (
        llada_jax.log_likelihood(m, prompt, answer, mc_num=64) for m in (model, narrow, coded, short)
    )
    assert abs(found - wanted) < abs(coarse - wanted) < 0.2 * abs(wanted)
    assert 0 < abs(found - wanted) < 3 * abs(rounded - wanted) + 0.005 * abs(wanted)
    tokens = [np.asarray(llada_jax.generate(m, prompt[None], gen_length=8, steps=8)) for m in (model, coded)]
    assert np.mean(tokens[0] == tokens[1]) > 0.7
