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
from llada_jax.model.attention import Past, _block, _cudnn, _per_device, attention, kernel_for, window_attention
from llada_jax.model.masks import Mask
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.mesh import BATCH, TOKENS, make_mesh

SEGMENTS = ["one", "padding", "documents"]
KINDS = [("full", 0), ("causal", 0), ("block_causal", 24), ("noisy_and_clean", 16)]


def problem(rng, *, B=2, N=4, K=2, L=256, H=64, dtype="float32", segments="one", kind="full", block=0):
    """q, k, v, a mask, and which positions count (those that are not padding)."""
    q, k, v = (jnp.asarray(rng.normal(size=(B, heads, L, H)), dtype) for heads in (N, K, K))
    row = L // 2 if kind == "noisy_and_clean" else L
    ids = np.ones((B, row), np.int32)
    if segments == "documents":
        ids[0, row // 3 :], ids[1, row // 2 + 5 :], ids[1, row // 2 + 40 :] = 2, 7, 3
    if segments != "one":
        ids[0, -row // 5 :] = ids[1, :3] = 0
    ids = np.tile(ids, L // row)
    mask = Mask(kind, None if segments == "one" else jnp.asarray(ids), block=block)
    return q, k, v, mask, jnp.asarray(ids > 0)


def dense(mask, L, S=None):
    """What each query sees, bool [B, L, S]: NumPy, position by position, from the text of masks.py."""
    S = L if S is None else S
    B = 1 if mask.segment_ids is None else len(mask.segment_ids)
    seen = np.zeros((B, L, S), bool)
    for q in range(L):
        for k in range(S):
            i, j = q, k
            if mask.kind == "noisy_and_clean":
                i, j = q % (S // 2), k % (S // 2)
            a, b = (i // mask.block, j // mask.block) if mask.block else (i, j)
            clean_q, clean_k = q >= S // 2, k >= S // 2
            seen[:, q, k] = {
                "full": True,
                "causal": i >= j,
                "block_causal": a >= b,
                "noisy_and_clean": {
                    (False, False): a == b, (False, True): a > b, (True, True): a >= b, (True, False): False,
                }[clean_q, clean_k],
            }[mask.kind]  # fmt: skip
    if mask.segment_ids is not None:
        ids = np.asarray(mask.segment_ids)
        seen &= (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
    return seen


def plain(q, k, v, mask):
    """Dense attention in float32 without anything of ours but the definition of the mask."""
    seen = jnp.asarray(dense(mask, q.shape[2], k.shape[2]))[:, None]
    k, v = (jnp.repeat(x.astype(jnp.float32), q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("BNLH,BNSH->BNLS", q.astype(jnp.float32), k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("BNLS,BNSH->BNLH", weights, v).astype(q.dtype)


def values_and_gradients(function, q, k, v, mask, counts):
    """The output where it counts, and the gradients of a loss that looks only there."""

    def loss(q, k, v):
        out = function(q, k, v, mask).astype(jnp.float32) * counts[:, None, :, None]
        return jnp.sum(jnp.sin(out + jnp.arange(out.shape[-1]))), out

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def with_kernel(kernel):
    return lambda q, k, v, mask: attention(q, k, v, mask, kernel)


def cudnn_as_xla(q, k, v, mask):
    """What is built around cuDNN, which itself needs a GPU; here XLA takes its place in the same call."""
    return _per_device(functools.partial(_cudnn, implementation="xla"), q, k, v, mask)


FUNCTIONS = {"xla": with_kernel("xla"), "splash": with_kernel("splash_interpret"), "cudnn": cudnn_as_xla}


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        b = np.asarray(b, np.float32)
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("kind, block", KINDS, ids=[kind for kind, _ in KINDS])
@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_every_kernel_answers_every_mask(rng, kernel, kind, block, segments):
    sizes = dict(L=300, N=2, H=128) if segments == "documents" else dict(L=256)
    args = problem(rng, kind=kind, block=block, segments=segments, **sizes)
    ours = values_and_gradients(FUNCTIONS[kernel], *args)
    assert all(bool(jnp.isfinite(x).all()) for x in ours)
    assert_close(ours, values_and_gradients(plain, *args), 2e-5)


@pytest.mark.parametrize("kind, block, L", [("noisy_and_clean", 50, 500), ("full", 0, 512)])
def test_splash_in_bfloat16_over_several_blocks(rng, monkeypatch, kind, block, L):
    """Of a full mask the backward kernel takes two blocks of keys at once."""
    monkeypatch.setattr(attention_module, "_block", lambda length, most: _block(length, 128))
    args = problem(rng, L=L, segments="documents", kind=kind, block=block, dtype="bfloat16")
    assert_close(values_and_gradients(FUNCTIONS["splash"], *args), values_and_gradients(FUNCTIONS["xla"], *args), 3e-2)


@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_queries_may_be_fewer_than_keys(rng, kernel):
    """Such as those of a window; segments of both sides are given."""
    q, k, v, mask, _ = problem(rng, L=256, segments="documents")
    ids = mask.segment_ids
    part = Mask(segment_ids=ids[:, 40:72], key_segment_ids=ids)
    assert (np.asarray(ids[:, 40:72]) > 0).all()
    found = FUNCTIONS[kernel](q[:, :, 40:72], k, v, part)
    assert_close([found], [plain(q, k, v, mask)[:, :, 40:72]], 2e-5)


@pytest.mark.parametrize("kind, block", KINDS[1:], ids=[kind for kind, _ in KINDS[1:]])
def test_blocks_and_order_follow_the_positions_that_are_given(rng, kind, block):
    """Restarting in each document they cut it where a row of that document alone is cut."""
    q, k, v, _, _ = problem(rng, B=1, L=120)
    copies = 2 if kind == "noisy_and_clean" else 1
    row = 120 // copies
    positions = np.tile(np.concatenate([np.arange(23), np.arange(row - 23)]), copies)[None].astype(np.int32)
    ids = np.tile(np.repeat([1, 2], [23, row - 23]), copies)[None].astype(np.int32)
    mask = Mask(kind, jnp.asarray(ids), jnp.asarray(positions), block=block)
    together = attention(q, k, v, mask, "xla")
    for document in (1, 2):
        own = np.flatnonzero(ids[0] == document)
        alone = attention(*(x[:, :, own] for x in (q, k, v)), Mask(kind, block=block), "xla")
        assert_close([together[:, :, own]], [alone], 1e-5)
    with pytest.raises(InputError, match=f"splash attention takes no positions for {kind} masks"):
        attention(q, k, v, mask, "splash_interpret")


@pytest.mark.parametrize("kind, block", [("full", 0), ("block_causal", 16)])
def test_a_window_beside_its_past_is_a_part_of_the_row(rng, kind, block):
    """One softmax over two parts is the softmax over all keys: values and gradients, hidden keys included."""
    q, k, v, _, _ = problem(rng, L=96)
    hidden = np.zeros((2, 96), bool)
    hidden[0, :5] = hidden[1, 80:] = True
    own = np.s_[48:80]
    mask = Mask(kind, block=block)
    seen = jnp.asarray(~hidden & ~np.isin(np.arange(96), np.arange(48, 80)))
    if kind == "block_causal":
        seen &= jnp.arange(96) < 48  # what precedes the window

    def window(q, k, v):
        return window_attention(q[:, :, own], k[:, :, own], v[:, :, own], Past(jnp.swapaxes(k, 2, 3), v, seen), mask)

    def whole(q, k, v):
        ids = jnp.asarray(~hidden, jnp.int32)
        row = dataclasses.replace(mask, segment_ids=jnp.ones_like(ids), key_segment_ids=ids)
        return attention(q, k, v, row, "xla")[:, :, own]

    loss = lambda f: lambda *qkv: jnp.sum(jnp.sin(f(*qkv)))
    both = [(f(q, k, v), *jax.grad(loss(f), argnums=(0, 1, 2))(q, k, v)) for f in (window, whole)]
    assert_close(*both, 2e-5)


CONTEXT_8 = dict(data=1, fsdp=1, tensor=1, context=8)
ALL_AXES = dict(data=1, fsdp=2, tensor=2, context=2)


@pytest.mark.parametrize(
    "kernel, sizes, kind, block",
    [
        ("splash", CONTEXT_8, "full", 0),
        ("splash", ALL_AXES, "causal", 0),
        ("splash", ALL_AXES, "noisy_and_clean", 16),
        ("cudnn", CONTEXT_8, "block_causal", 24),
        ("cudnn", ALL_AXES, "full", 0),
        ("xla", ALL_AXES, "noisy_and_clean", 16),
    ],
)
def test_context_parallelism_changes_nothing(rng, kernel, sizes, kind, block):
    q, k, v, mask, counts = problem(rng, L=256, segments="documents", kind=kind, block=block)
    alone = values_and_gradients(FUNCTIONS["xla"], q, k, v, mask, counts)
    mesh = make_mesh(sizes)
    heads, tokens = P(BATCH, "tensor", "context", None), TOKENS
    with jax.set_mesh(mesh):
        place = lambda x, axes: jax.device_put(x, NamedSharding(mesh, axes))
        q, k, v = (place(x, heads) for x in (q, k, v))
        mask, counts = jax.tree.map(lambda x: place(x, tokens), (mask, counts))
        over_mesh = jax.jit(lambda *args: values_and_gradients(FUNCTIONS[kernel], *args))(q, k, v, mask, counts)
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
