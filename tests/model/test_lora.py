"""Adapters and 8-bit weights in the model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from reference import REFERENCE
from safetensors.numpy import load_file

from llada_jax.config import Lora
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.model import lora, quantize
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.mesh import make_mesh

VECTORS = load_file(REFERENCE / "lora" / "lora.safetensors")
CASES = json.loads((REFERENCE / "lora" / "lora.json").read_text())["lora"]
ALL = Lora(rank=3, targets=lora.TARGETS)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=tolerance * np.abs(b).max())


def randomized(model, seed=0):
    """The model with other numbers in its adapters, so that both halves count."""
    key = jax.random.key(seed)
    made = {}
    for i, (name, adapter) in enumerate(lora.adapters_of(model).items()):
        A, B = (
            jax.random.normal(jax.random.fold_in(key, 2 * i + j), x.shape) for j, x in enumerate((adapter.A, adapter.B))
        )
        made[name] = lora.Adapter(A, B / 10, adapter.scale[...], adapter.rate)
    return lora.with_adapters(model, made)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(dict(data=2, fsdp=2, tensor=2, context=1))


@pytest.mark.parametrize("case", CASES)
def test_logits_before_with_and_after_merging_are_those_of_peft(case):
    ids = VECTORS[f"{case}_ids"].astype(np.int32)
    base = hf.load(REFERENCE / "ckpt_a_mha")
    model = hf.load(REFERENCE / "ckpt_a_mha", adapter=REFERENCE / "lora" / case)
    close(base(ids), VECTORS[f"{case}_logits_base"])
    close(model(ids), VECTORS[f"{case}_logits_adapter_f64"])
    merged, _ = lora.merge(model)
    close(merged(ids), VECTORS[f"{case}_logits_merged"])
    name = CASES[case]["merged_example_tensor"].split(".")
    weight = getattr(merged.blocks, name[-2])[int(name[-3])]
    close(weight.reshape(len(weight), -1), VECTORS[f"{case}_merged_example"], 1e-6)
    assert not lora.adapters_of(merged) and lora.adapters_of(model)


@pytest.mark.parametrize("quantized", [None, "int8", "int4"])
def test_a_model_with_adapters_computes_the_same_on_a_mesh(mesh, quantized, monkeypatch):
    monkeypatch.setattr(quantize, "_GROUP", 16)  # so that the groups of so small a model can be split
    place = [REFERENCE / "lora" / "adapter_1", REFERENCE / "lora" / "adapter_0"]
    ids = np.tile(VECTORS["adapter_1_ids"], (2, 1)).astype(np.int32)
    wanted = hf.load(REFERENCE / "ckpt_a_mha", adapter=place, quantize=quantized)
    found = hf.load(REFERENCE / "ckpt_a_mha", mesh=mesh, adapter=place, quantize=quantized)
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda model, ids: model(ids))(found, jax.device_put(ids, jax.NamedSharding(mesh, jax.P())))
    close(logits, np.asarray(wanted(ids)))


def test_a_mesh_that_would_split_groups_of_int4_is_refused(mesh):
    with pytest.raises(InputError, match="q_proj has 1 .* of 64 inputs, which mesh.fsdp=2 would split"):
        hf.load(REFERENCE / "ckpt_a_mha", mesh=mesh, quantize="int4")


def test_merging_on_a_mesh_gives_the_same_weights_where_they_lay(mesh):
    """To the rounding of one sum: a product of other shapes adds its ranks in another order."""
    place = REFERENCE / "lora" / "adapter_1"
    wanted, most = lora.merge(hf.load(REFERENCE / "ckpt_a_mha", adapter=place))
    on_mesh = hf.load(REFERENCE / "ckpt_a_mha", mesh=mesh, adapter=place)
    with jax.set_mesh(mesh):
        found, moved = lora.merge(on_mesh)
    assert moved == pytest.approx(most, rel=1e-6)
    assert found.blocks.ff_out.sharding == on_mesh.blocks.ff_out.sharding
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(x, np.asarray(y), 2e-7)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_adapters_are_those_of_peft(case):
    """Cross-entropy of given targets at the masked positions, in float32."""
    ids = VECTORS[f"{case}_ids"].astype(np.int32)
    model = hf.load(REFERENCE / "ckpt_a_mha", adapter=REFERENCE / "lora" / case)
    c = model.config
    masked, targets = ids == c.mask_token_id, (ids * 7 + 3) % (c.vocab_size - 20)

    def loss(adapters):
        log_p = jax.nn.log_softmax(lora.with_adapters(model, adapters)(ids).astype(jnp.float32))
        return -jnp.sum(jnp.where(masked, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0)) / masked.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(lora.adapters_of(model))
    wanted = CASES[case]["train_step"]
    norm = lambda half: np.sqrt(sum(float(jnp.sum(getattr(g, half)[...] ** 2)) for g in gradients.values()))
    assert float(value) == pytest.approx(wanted["loss_f64"], rel=1e-5)
    assert norm("A") == pytest.approx(wanted["grad_norm_A"], rel=1e-3)
    assert norm("B") == pytest.approx(wanted["grad_norm_B"], rel=1e-3)


@pytest.mark.slow
def test_fresh_adapters_on_every_weight_change_no_bit(tiny):
    model = Transformer(tiny, jax.random.key(0))
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    made = lora.attach(model, ALL, jax.random.key(1))
    np.testing.assert_array_equal(np.asarray(made(ids)), np.asarray(model(ids)))
    A, B = made.blocks.lora["ff_out"].A[...], made.blocks.lora["ff_out"].B[...]
    assert A.shape == (2, 3, 48) and 0.9 / 48**0.5 < float(jnp.abs(A).max()) <= 1 / 48**0.5 and not B.any()


@pytest.mark.parametrize("rslora, scale", [(False, 64 / 3), (True, 64 / 3**0.5)])
def test_adapters_of_every_weight_are_what_plain_float64_makes_of_the_merged_weights(tiny, rslora, scale):
    c = dataclasses.replace(ALL, rslora=rslora)
    model = randomized(lora.attach(Transformer(tiny, jax.random.key(0)), c, jax.random.key(1)))
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    weights = plain.parameters(Transformer(tiny, jax.random.key(0)))
    for name, adapter in lora.adapters_of(model).items():
        A, B = (np.asarray(x[...], np.float64) for x in (adapter.A, adapter.B))
        if name == "wte":
            weights["wte"] = weights["wte"] + scale * (B @ A).T
            continue
        delta = np.einsum("lor,lri->loi", B.reshape(2, -1, 3), A.reshape(2, 3, -1))
        weights[f"blocks.{name}"] = weights[f"blocks.{name}"] + scale * delta.reshape(weights[f"blocks.{name}"].shape)
    wanted = plain.forward(weights, tiny, ids)
    close(model(ids), wanted, 1e-4)
    close(lora.merge(model)[0](ids), wanted, 1e-4)


def test_the_size_of_adapters_is_that_of_their_products_beside_the_weights(mesh):
    some = dataclasses.replace(ALL, targets=("q_proj", "attn_out", "ff_out", "wte"))
    fresh_on = jax.jit(lambda base: lora.attach(base, some, jax.random.key(1)))
    model, ratios = randomized(fresh_on(hf.load(REFERENCE / "ckpt_a_mha", quantize="int8"))), []
    for name, adapter in lora.adapters_of(model).items():
        weight = quantize.decode(model.wte if name == "wte" else getattr(model.blocks, name), name)
        parts = [np.asarray(x, np.float64) for x in (adapter.A, adapter.B, adapter.scale, weight)]
        for A, B, scale, W in [parts] if name == "wte" else zip(*parts, strict=True):
            ratios.append(np.linalg.norm(np.tensordot(B * scale, A, 1)) / np.linalg.norm(W))
    wanted = np.mean(ratios), np.max(ratios)
    np.testing.assert_allclose(jax.jit(lora.relative_size)(model), wanted, rtol=1e-5)
    with jax.set_mesh(mesh):
        fresh = fresh_on(hf.load(REFERENCE / "ckpt_a_mha", mesh=mesh, quantize="int8"))
        on_mesh = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), model, fresh)
        np.testing.assert_allclose(jax.jit(lora.relative_size)(on_mesh), wanted, rtol=1e-5)


def test_the_effects_of_several_adapters_add_up(tiny):
    base = Transformer(tiny, jax.random.key(0))
    some = Lora(rank=2, alpha=1.0, targets=("q_proj", "wte"))
    first = randomized(lora.attach(base, some, jax.random.key(1)), 1)
    second = randomized(lora.attach(base, dataclasses.replace(ALL, alpha=6.0), jax.random.key(2)), 2)
    both = lora.with_adapters(base, lora.combined(lora.adapters_of(first), lora.adapters_of(second)))
    weights = [plain.parameters(lora.merge(model)[0]) for model in (base, first, second, both)]
    for name, x in weights[0].items():
        close(weights[3][name], weights[1][name] + weights[2][name] - x, 1e-6)


def test_dropout_keeps_the_mean_and_its_bits_on_a_mesh(tiny, mesh):
    config = dataclasses.replace(tiny, n_layers=1)
    c = dataclasses.replace(ALL, dropout=0.5, targets=("up_proj",))
    model = randomized(lora.attach(Transformer(config, jax.random.key(0)), c, jax.random.key(1)))
    x = jax.random.normal(jax.random.key(2), (8, 16, config.d_model))
    adapter = lambda i: jax.tree.map(lambda x: x[0], lora.dropping(model, jax.random.key(i)).blocks.lora["up_proj"])
    apply = jax.jit(lambda a, x: a(x, quantize.PRODUCTS["up_proj"], "float32", None))
    plainly = apply(jax.tree.map(lambda x: x[0], model.blocks.lora["up_proj"]), x)
    dropped = [np.asarray(apply(adapter(i), x)) for i in range(200)]
    assert not np.allclose(dropped[0], dropped[1])
    assert np.abs(np.mean(dropped, 0) - plainly).mean() < 0.15 * np.abs(dropped[0] - plainly).mean()
    with jax.set_mesh(mesh):
        lying = jax.device_put(x, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        on_mesh = jax.jit(lambda a, x: a(x, quantize.PRODUCTS["up_proj"], "float32", jax.P(("data", "fsdp"))))
        close(on_mesh(adapter(0), lying), dropped[0])
    assert (
        lora.dropping(lora.attach(model, ALL, jax.random.key(1)), jax.random.key(0)).blocks.lora["q_proj"].key is None
    )


@pytest.mark.parametrize("kind, most", [("int8", 127), ("int4", 7)])
def test_weights_in_few_bits_are_within_half_a_step_and_multiply_as_such(tiny, rng, kind, most):
    """In float64. An F of 48 makes three groups of int4, of 16 each."""
    model = Transformer(dataclasses.replace(tiny, n_kv_heads=2), jax.random.key(0))
    coded = jax.jit(quantize.quantize, static_argnums=1)(model, kind)
    x = {"BLD": rng.normal(size=(2, 3, 32)), "BNLH": rng.normal(size=(2, 4, 3, 8)), "BLF": rng.normal(size=(2, 3, 48))}
    for name, letters in quantize.PRODUCTS.items():
        inner = quantize.inner_axes(name)
        weight, code = getattr(model.blocks, name), getattr(coded.blocks, name)
        values, scale, exact = (np.asarray(x, np.float64) for x in (code.values, code.scale, weight))
        assert code.values.dtype == jnp.dtype(kind) and np.abs(values).max() == most
        assert quantize.shape_of(code, name) == weight.shape
        axes = tuple(range(-inner, 0))
        if kind == "int4":  # the axes of the input first, and a scale for each group of the last
            groups, last, outer = 3 if name == "ff_out" else 1, weight.shape[-1], range(1, weight.ndim - inner)
            exact = exact.reshape(*weight.shape[:-1], groups, last // groups)
            exact, axes = np.moveaxis(exact, outer, range(-len(outer), 0)), (-1 - len(outer),)
        decoded, step = values * np.expand_dims(scale, axes), np.abs(exact).max(axes, keepdims=True) / most
        assert (np.abs(decoded - exact) <= step * (0.5 + most / 256)).all()  # a scale has 8 bits
        np.testing.assert_array_equal(quantize.decode(code, name), decoded)
        if kind == "int4":
            decoded = np.moveaxis(decoded, range(-len(outer), 0), outer).reshape(weight.shape)
        layer = jax.tree.map(lambda x: x[0], code)
        wanted = np.einsum(letters, x[letters.split(",")[0]], decoded[0])
        close(
            quantize.product(jnp.asarray(x[letters.split(",")[0]], jnp.float32), layer, letters, "float32", None),
            wanted,
        )


@pytest.mark.parametrize(
    "targets, message",
    [(("o_proj",), "o_proj"), ((), "targets"), (("wte", "wte"), "different"), (("blocks",), "blocks")],
)
def test_targets_that_match_nothing_are_refused(tiny, targets, message):
    with pytest.raises(InputError, match=message):
        lora.attach(Transformer(tiny, jax.random.key(0)), Lora(rank=1, targets=targets), jax.random.key(1))


def test_what_cannot_be_merged_is_refused(tiny):
    model = Transformer(dataclasses.replace(tiny, weight_tying=True), jax.random.key(0))
    with pytest.raises(InputError, match="also the head"):
        lora.merge(lora.attach(model, ALL, jax.random.key(1)))
    with pytest.raises(InputError, match="quantised"):
        lora.merge(lora.attach(quantize.quantize(model), Lora(rank=1), jax.random.key(1)))
