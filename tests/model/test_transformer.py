"""Shapes and laws of the Transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec as P

from llada_jax.fields import InputError
from llada_jax.model import products, transformer
from llada_jax.model.config import PRESETS, REMAT
from llada_jax.model.transformer import Transformer, parameter_count, rms_norm, rope
from llada_jax.parallel import chips, mesh


def test_published_parameter_counts():
    counts = {name: parameter_count(PRESETS[name]) for name in PRESETS}
    assert counts["llada_8b"] == 8_015_581_184
    assert counts["llada_8b"] - 2 * 126464 * 4096 == 6_979_588_096
    assert round(counts["llada_1b"] / 1e9, 2) == round(counts["arm_1b"] / 1e9, 2) == 1.49
    assert round(counts["arm_7b"] / 1e9, 2) == 6.83
    assert round(counts["illada_8b"] / 1e9, 2) == 7.62


@pytest.mark.parametrize("heads, kv_heads, tied", [(4, 4, False), (4, 1, True)])
def test_forward_against_float64_numpy(tiny, rng, heads, kv_heads, tied):
    c = dataclasses.replace(tiny, n_heads=heads, n_kv_heads=kv_heads, weight_tying=tied)
    model = Transformer(c, jax.random.key(1))
    tokens = rng.integers(0, 64, (2, 9))
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9])
    logits = np.asarray(model(jnp.asarray(tokens), jnp.asarray(segments)))
    np.testing.assert_allclose(
        logits, plain.forward(plain.parameters(model), c, tokens, plain.of_segments(segments)), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("init", ["mitchell", "normal"])
def test_initial_standard_deviations(tiny, init):
    c = dataclasses.replace(tiny, d_model=256, mlp_hidden_size=512, n_heads=4, n_kv_heads=4, n_layers=3, init=init)
    model = Transformer(c, jax.random.key(0))
    std = lambda w: float(np.std(np.asarray(w)) / 0.9866)  # normal, cut at three standard deviations
    depth = np.arange(1, 4)
    wanted = {
        "mitchell": (1 / 16, 1 / 16, 1 / 16 / np.sqrt(2 * depth), 512**-0.5 / np.sqrt(2 * depth)),
        "normal": (512**-0.5, 0.02, 0.02 / np.sqrt([6, 6, 6]), 0.02 / np.sqrt([6, 6, 6])),
    }[init]
    assert std(model.wte[...]) == pytest.approx(wanted[0], rel=0.02)
    assert std(model.blocks.up_proj[...]) == pytest.approx(wanted[1], rel=0.02)
    for i in range(3):
        assert std(model.blocks.attn_out[i]) == pytest.approx(wanted[2][i], rel=0.02)
        assert std(model.blocks.ff_out[i]) == pytest.approx(wanted[3][i], rel=0.02)


@pytest.mark.parametrize("remat", REMAT[1:])
def test_rematerialisation_changes_no_gradient(tiny, remat):
    tokens = jnp.arange(24).reshape(2, 12)
    loss = lambda model: jnp.mean(model(tokens) ** 2)
    plain = Transformer(tiny, jax.random.key(0))
    saved = Transformer(dataclasses.replace(tiny, remat=remat), jax.random.key(0))
    for a, b in zip(jax.tree.leaves(jax.grad(loss)(plain)), jax.tree.leaves(jax.grad(loss)(saved)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def test_rematerialisation_takes_less_memory_on_a_cpu(tiny):
    def temporaries(remat):
        c = dataclasses.replace(tiny, n_layers=8, remat=remat)
        model = jax.eval_shape(lambda key: Transformer(c, key), jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda model, tokens: jnp.sum(model(tokens) ** 2)))
        return gradient.lower(model, jnp.zeros((4, 64), jnp.int32)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.5 * temporaries("none")


@pytest.mark.parametrize("residual", ["parameters", "compute"])
def test_computing_in_bfloat16_stays_near_float32(tiny, residual):
    tokens = jnp.arange(24).reshape(2, 12)
    exact = Transformer(tiny, jax.random.key(0))(tokens)
    rough = Transformer(dataclasses.replace(tiny, dtype="bfloat16", residual=residual), jax.random.key(0))(tokens)
    assert rough.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(exact) - np.asarray(rough, np.float32)).mean()
    assert 0 < difference < 0.05 * np.abs(np.asarray(exact)).mean()


def test_gradients_that_wait_for_the_sums_of_others_are_the_same(tiny, monkeypatch):
    def gradients(options):
        monkeypatch.setattr(mesh, "compiler_options_for", lambda _: options)
        with jax.set_mesh(mesh.make_mesh(dict(fsdp=2, tensor=2, context=1, data=2))):
            loss = jax.jit(jax.grad(lambda model, tokens: jnp.sum(model(tokens) ** 2)))
            model, tokens = (
                jax.jit(Transformer, static_argnums=0)(tiny, jax.random.key(0)),
                jnp.arange(32).reshape(4, 8),
            )
            return str(loss.trace(model, tokens).jaxpr).count("optimization_barrier"), loss(model, tokens)

    (without, plain), (barriers, waited) = gradients({}), gradients(chips.SUMS_BESIDE_PRODUCTS)
    assert barriers > without
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(waited), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6 * np.abs(a).max())


@pytest.mark.parametrize("sizes", [None, dict(data=1, fsdp=2, tensor=2, context=2)])
def test_every_platform_computes_the_same(tiny, sizes, monkeypatch):
    """The orders in which products and rotations are computed on a CPU, a GPU and a TPU: loss and gradients."""
    c = dataclasses.replace(tiny, mlp_hidden_size=96)  # wider and narrower than the model: both orders of a gradient
    found = {}
    for name in ("cpu", "gpu", "tpu"):
        for module in (products, transformer):
            monkeypatch.setattr(module, "platform", lambda name=name: name)
        with mesh.under(mesh.make_mesh(sizes) if sizes else None):
            model = jax.jit(Transformer, static_argnums=0)(c, jax.random.key(0))
            tokens = jnp.arange(64).reshape(4, 16)
            step = jax.jit(jax.value_and_grad(lambda model, tokens: jnp.sum(model(tokens) ** 2)))
            found[name] = jax.tree.map(np.asarray, jax.tree.leaves(step(model, tokens)))
    for name in ("gpu", "tpu"):
        for a, b in zip(found["cpu"], found[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_a_cpu_transposes_the_narrow_factor_of_a_gradient():
    B, L, D, F = 2, 64, 32, 96
    with mesh.under(mesh.make_mesh(dict.fromkeys(mesh.AXES, 1), jax.devices()[:1])):
        x, weight = jnp.ones((B, L, D)), jnp.ones((F, D))
        loss = lambda weight: jnp.sum(products.times(x, weight, products.PRODUCTS["up_proj"], P(None, None, None)) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(weight).compile().as_text()
    assert f"f32[{D},{B * L}]" in compiled and f"f32[{F},{B * L}]" not in compiled
    assert "lhs_contracting_dims={0}" not in compiled  # a wide factor that is transposed as it is read


def test_rope_is_relative(rng):
    x = jnp.asarray(rng.normal(size=(1, 1, 8, 16)), jnp.float32)
    score = lambda a, b: np.einsum("bnlh,bnsh->bnls", rope(a, 1e4), rope(b, 1e4))[0, 0]
    shifted = jnp.concatenate([jnp.zeros((1, 1, 5, 16)), x], axis=2)
    np.testing.assert_allclose(score(x, x), score(shifted, shifted)[5:, 5:], rtol=1e-4, atol=1e-4)


def test_rms_norm_has_unit_mean_square(rng):
    out = np.asarray(rms_norm(jnp.asarray(rng.normal(size=(3, 5, 64)) * 7, jnp.float32), jnp.ones(64), 0.0))
    np.testing.assert_allclose((out**2).mean(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_heads=5), "d_model 32 is not a multiple of n_heads 5"),
        (dict(n_kv_heads=3), "n_heads 4 is not a multiple of n_kv_heads 3"),
        (dict(embedding_size=10), "vocab_size 64 exceeds embedding_size 10"),
        (dict(mask_token_id=64), "mask_token_id 64 is outside"),
        (dict(dtype="float8"), "dtype is 'float8'; it must be one of bfloat16, float32"),
        (dict(n_layers=0), "n_layers is 0"),
    ],
)
def test_impossible_shapes_are_named(tiny, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny, **change)
