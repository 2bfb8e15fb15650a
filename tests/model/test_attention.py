"""The TPU's and the GPU's attention, run on a CPU, against the plain one: every mask kind, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.fields import InputError
from llada_jax.model import attention as attention_module
from llada_jax.model.attention import _block, _cudnn, _per_device, attention, kernel_for
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.mesh import BATCH, TOKENS, make_mesh

KINDS = ["full", "padding", "segments"]


def problem(rng, *, B=2, N=4, K=2, L=256, H=64, dtype="float32", kind="full"):
    """q, k, v, segment ids or None, and which positions count (those that are not padding)."""
    q, k, v = (jnp.asarray(rng.normal(size=(B, heads, L, H)), dtype) for heads in (N, K, K))
    ids = np.ones((B, L), np.int32)
    if kind == "segments":
        ids[0, L // 3 :], ids[1, L // 2 + 5 :], ids[1, L // 2 + 40 :] = 2, 7, 3
    if kind != "full":
        ids[0, -L // 5 :] = ids[1, :3] = 0
    return q, k, v, None if kind == "full" else jnp.asarray(ids), jnp.asarray(ids > 0)


def values_and_gradients(function, q, k, v, ids, counts, causal):
    """The output where it counts, and the gradients of a loss that looks only there."""

    def loss(q, k, v):
        out = function(q, k, v, ids, causal).astype(jnp.float32) * counts[:, None, :, None]
        return jnp.sum(jnp.sin(out + jnp.arange(out.shape[-1]))), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def with_kernel(kernel):
    return lambda q, k, v, ids, causal: attention(q, k, v, ids, causal, kernel)


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        b = np.asarray(b, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [dict(L=256), dict(L=300, N=2, H=128)], ids=["256", "300"])
def test_splash_is_the_plain_attention(rng, kind, causal, sizes):
    args = *problem(rng, kind=kind, **sizes), causal
    ours = values_and_gradients(with_kernel("splash_interpret"), *args)
    assert all(bool(jnp.isfinite(x).all()) for x in ours)
    assert_close(ours, values_and_gradients(with_kernel("xla"), *args), 1e-5)


def test_splash_in_bfloat16_over_several_blocks(rng, monkeypatch):
    monkeypatch.setattr(attention_module, "_block", lambda length, most: _block(length, 128))
    args = *problem(rng, L=500, kind="segments", dtype="bfloat16"), False
    assert_close(
        values_and_gradients(with_kernel("splash_interpret"), *args),
        values_and_gradients(with_kernel("xla"), *args),
        3e-2,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_built_around_cudnn_is_the_plain_attention(rng, kind, causal):
    """cuDNN itself needs a GPU; here XLA takes its place in the same call."""
    call = lambda q, k, v, ids, causal: _cudnn(q, k, v, ids, ids, causal, 0, 1, implementation="xla")
    args = *problem(rng, kind=kind), causal
    assert_close(values_and_gradients(call, *args), values_and_gradients(with_kernel("xla"), *args), 1e-5)


CONTEXT_8 = dict(data=1, fsdp=1, tensor=1, context=8)
ALL_AXES = dict(data=1, fsdp=2, tensor=2, context=2)


def cudnn_as_xla(*args):
    return _per_device(functools.partial(_cudnn, implementation="xla"), *args)


@pytest.mark.parametrize(
    "function, sizes, causal",
    [
        (with_kernel("splash_interpret"), CONTEXT_8, False),
        (with_kernel("splash_interpret"), ALL_AXES, True),
        (cudnn_as_xla, CONTEXT_8, True),
        (cudnn_as_xla, ALL_AXES, False),
    ],
)
def test_context_parallelism_changes_nothing(rng, function, sizes, causal):
    q, k, v, ids, counts = problem(rng, L=256, kind="segments")
    alone = values_and_gradients(with_kernel("xla"), q, k, v, ids, counts, causal)
    mesh = make_mesh(sizes)
    heads, tokens = P(BATCH, "tensor", "context", None), TOKENS
    with jax.set_mesh(mesh):
        args = [
            jax.device_put(x, NamedSharding(mesh, s))
            for x, s in zip((q, k, v, ids, counts), (heads, heads, heads, tokens, tokens), strict=True)
        ]
        over_mesh = jax.jit(lambda *a: values_and_gradients(function, *a, causal))(*args)
        assert over_mesh[1].sharding.spec == heads
        assert_close(over_mesh, alone, 1e-5)


def test_a_model_trains_through_splash_over_context(tiny):
    """The whole model, scan and saved attention included: hidden states and gradients are those of the plain kernel."""
    tokens = jnp.arange(256).reshape(2, 128) % 60
    segments = jnp.where(jnp.arange(128) < 100, 1, 0) * jnp.ones((2, 1), jnp.int32)

    def gradients(kernel):
        config = dataclasses.replace(tiny, n_layers=1, remat="attention", attention_kernel=kernel)
        mesh = make_mesh(ALL_AXES)
        with jax.set_mesh(mesh):
            model = jax.jit(lambda key: Transformer(config, key))(jax.random.key(0))
            place = lambda x: jax.device_put(x, NamedSharding(mesh, TOKENS))
            loss = lambda m, t, s: jnp.sum(jnp.where(s[..., None] > 0, m.hidden(t, s), 0.0) ** 3)
            return jax.tree.leaves(jax.jit(jax.grad(loss))(model, place(tokens), place(segments)))

    assert_close(gradients("splash_interpret"), gradients("xla"), 2e-4)


@pytest.mark.parametrize(
    "name, platform, dtype, chosen",
    [
        ("auto", "cpu", "bfloat16", "xla"),
        ("auto", "tpu", "bfloat16", "splash"),
        ("auto", "tpu", "float32", "splash"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),
        ("xla", "tpu", "bfloat16", "xla"),
    ],
)
def test_the_kernel_is_that_of_the_platform(name, platform, dtype, chosen):
    assert kernel_for(name, platform, dtype) == chosen


@pytest.mark.parametrize(
    "name, platform, dtype",
    [
        ("splash", "cpu", "bfloat16"),
        ("cudnn", "tpu", "bfloat16"),
        ("cudnn", "gpu", "float32"),
        ("flash", "tpu", "int8"),
    ],
)
def test_a_kernel_that_cannot_serve_is_refused(name, platform, dtype):
    with pytest.raises(InputError, match=f"{name}.*can't serve {dtype} on {platform}; there: "):
        kernel_for(name, platform, dtype)


def test_blocks_divide_the_row_or_pad_it_little():
    for length in [1, 128, 300, 1024, 1152, 2176, 4096, 5120, 8192, 32768, 40000]:
        for most in (512, 1024, 2048, 4096):
            block = _block(length, most)
            assert block % 128 == 0 and block <= most
            assert -length % block < max(128 * -(-length // most), 128)
    assert [_block(length, 4096) for length in (300, 4096, 5120, 32768)] == [384, 4096, 2560, 4096]
