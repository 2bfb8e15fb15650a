"""The chunked cross-entropy at scored positions against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.objectives.cross_entropy import scored_cross_entropy
from llada_jax.parallel.mesh import HIDDEN, TOKENS, make_mesh


def naive(hidden, head, targets, weights):
    logits = jnp.einsum("BLD,VD->BLV", hidden, head, preferred_element_type=jnp.float32)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return jnp.sum(ce * weights), jnp.where(weights == 0, 0.0, ce)


def problem(rng, B, L, D, V, dtype, share=0.5):
    hidden = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)) * 0.3, dtype)
    weights = rng.random((B, L)) * (rng.random((B, L)) < share)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32), jnp.asarray(weights, jnp.float32)


def both(function, hidden, head, targets, weights):
    f = lambda h, w: function(h, w, targets, weights)
    (loss, ce), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, head)
    return loss, ce, *grads


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [(3, 7, 8, 11), (2, 64, 16, 200)])
@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
def test_values_and_gradients_are_those_of_the_plain_one(rng, dtype, tolerance, shape, chunk):
    args = problem(rng, *shape, dtype)
    ours = both(lambda *a: scored_cross_entropy(*a, chunk), *args)
    for got, want in zip(ours, both(naive, *args), strict=True):
        want = np.asarray(want, np.float64)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * np.abs(want).max()
        )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_and_all_positions_scored(rng, share):
    args = problem(rng, 2, 9, 8, 20, "float32", share)
    for got, want in zip(both(scored_cross_entropy, *args), both(naive, *args), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=2, fsdp=2, tensor=2, context=1),
        dict(data=1, fsdp=2, tensor=2, context=2),
        dict(data=1, fsdp=1, tensor=8, context=1),
        dict(data=8, fsdp=1, tensor=1, context=1),
    ],
)
def test_a_mesh_changes_nothing_though_its_devices_hold_different_numbers_of_masks(rng, sizes):
    hidden, head, targets, weights = problem(rng, 8, 16, 8, 32, "float32")
    weights = weights.at[:5].set(0.0)  # some devices have nothing to do
    alone = both(scored_cross_entropy, hidden, head, targets, weights)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        args = placed(mesh, hidden, head, targets, weights)
        over_mesh = jax.jit(lambda *a: both(scored_cross_entropy, *a))(*args)
        assert over_mesh[3].sharding.spec == P("tensor", "fsdp")
    for got, want in zip(over_mesh, alone, strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-6)


def placed(mesh, *arrays):
    axes = HIDDEN, P("tensor", "fsdp"), TOKENS, TOKENS
    return [jax.device_put(x, NamedSharding(mesh, a)) for x, a in zip(arrays, axes, strict=True)]


def test_no_logits_of_the_whole_batch_exist():
    """The compiled program's temporaries stay far below [B, L, V]."""
    B, L, D, V = 8, 512, 16, 20000
    shapes = [((B, L, D), "float32"), ((V, D), "float32"), ((B, L), "int32"), ((B, L), "float32")]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    compiled = jax.jit(lambda *a: both(scored_cross_entropy, *a)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < B * L * V * 4 / 2


def test_the_matrix_is_gathered_and_its_gradient_reduced_once_not_per_chunk(rng):
    """The loop's trips differ between devices, so that in it only peers of the tensor axis may meet."""
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2, context=1))
    with jax.set_mesh(mesh):
        args = placed(mesh, *problem(rng, 8, 16, 8, 32, "float32"))
        jaxpr = jax.make_jaxpr(lambda *a: both(scored_cross_entropy, *a))(*args).jaxpr
    inside, outside = [], []
    for name, axes, in_loop in collectives(jaxpr, False):
        (inside if in_loop else outside).append((name, axes))
    assert inside and all(axes == ("tensor",) for _, axes in inside)
    assert [axes for name, axes in outside if name == "all_gather"] == [("fsdp",)]
    assert [axes for name, axes in outside if name == "reduce_scatter"] == [("fsdp",)]


def collectives(jaxpr, in_loop):
    """(primitive, its axes, whether it stands in a while loop) of a program and all within it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("psum", "pmax", "all_gather", "reduce_scatter"):
            axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["axis_name"]
            yield eqn.primitive.name, axes if isinstance(axes, tuple) else (axes,), in_loop
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from collectives(inner, in_loop or eqn.primitive.name == "while")
