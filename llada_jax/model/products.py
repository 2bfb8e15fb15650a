"""The products of a layer with its weights, as the compiler of each platform does them best."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from llada_jax.parallel.mesh import current_mesh, gathered, platform, spec, sums_beside_products

# The products of a block: its input, the weight (outputs first) and the output. B batch, L length, D model width,
# N query heads, K key heads, H head size, F MLP width.
PRODUCTS = {
    "q_proj": "BLD,NHD->BLNH", "k_proj": "BLD,KHD->BLKH", "v_proj": "BLD,KHD->BLKH", "attn_out": "BNLH,DNH->BLD",
    "ff_proj": "BLD,FD->BLF", "up_proj": "BLD,FD->BLF", "ff_out": "BLF,DF->BLD",
}  # fmt: skip


def times(x: jax.Array, weight: jax.Array, letters: str, out: P | None, dtype=None) -> jax.Array:
    """einsum(letters, x, weight), the contracted axes the last ones of the weight and the others last in the result.

    A weight that is split over fsdp is gathered. out: sharding of the result; None without a mesh. dtype: of the
    result, by default that of the factors.
    """
    if platform() == "tpu" and len(halves(letters)[1]) == 2:
        return _by_rows(x, weight, letters, out)
    weight = gathered(weight)
    if platform() == "tpu" and dtype is None:
        return _held_in_order(jnp.einsum(letters, x, weight, out_sharding=out))
    if platform() == "cpu" and out is None:
        return _by_columns(x, weight, letters, dtype)
    if platform() == "cpu" and dtype is None:
        return _narrow_gradient(x, weight, letters, out)
    return jnp.einsum(letters, x, weight, out_sharding=out, preferred_element_type=dtype)


def _by_columns(x: jax.Array, weight: jax.Array, letters: str, dtype) -> jax.Array:
    """weight · xᵀ: on CPUs products of 32 columns (a window of a sampler) are 1.3 times as fast so."""
    inputs, outputs = letters.split(",")[0], letters.split("->")[1]
    inner, outer = halves(letters)
    columns = "".join(a for a in inputs if a not in inner)
    x_columns = jnp.einsum(f"{inputs}->{inner}{columns}", x)
    y = jnp.tensordot(weight, x_columns, axes=len(inner), preferred_element_type=dtype)
    return jnp.einsum(f"{outer}{columns}->{outputs}", y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _narrow_gradient(x: jax.Array, weight: jax.Array, letters: str, out: P) -> jax.Array:
    """einsum(letters, x, weight). XLA's CPU compiler transposes the first factor of the weight's gradient, at great
    cost where it is as wide as an MLP: here that is the narrower of input and output, and of equals the input, which
    q, k and v share. A training step takes 8% less, and another 3% for the barrier below."""
    return jnp.einsum(letters, x, weight, out_sharding=out)


def _narrow_gradient_backward(letters: str, out: P, factors, dy: jax.Array):
    inputs, outputs = letters.split(",")[0], letters.split("->")[1]
    inner, outer = halves(letters)
    x, weight = factors
    dx = jnp.einsum(f"{outputs},{outer}{inner}->{inputs}", dy, weight, out_sharding=jax.typeof(x).sharding.spec)
    axes = dict(zip(outer + inner, jax.typeof(weight).sharding.spec, strict=True))
    sharding = lambda result: P(*(axes[letter] for letter in result))
    size = dict(zip(outer + inner, weight.shape, strict=True))
    if math.prod(size[a] for a in inner) <= math.prod(size[a] for a in outer):
        dw = jnp.einsum(f"{inputs},{outputs}->{inner}{outer}", x, dy, out_sharding=sharding(inner + outer))
        dw = jax.lax.optimization_barrier(dw)  # else XLA makes this and the transpose one product, of the wide factor
        return dx, jnp.einsum(f"{inner}{outer}->{outer}{inner}", dw)
    return dx, jnp.einsum(f"{outputs},{inputs}->{outer}{inner}", dy, x, out_sharding=sharding(outer + inner))


_narrow_gradient.defvjp(
    lambda x, weight, letters, out: (_narrow_gradient(x, weight, letters, out), (x, weight)), _narrow_gradient_backward
)


def _by_rows(x: jax.Array, weight: jax.Array, letters: str, out: P | None) -> jax.Array:
    """The heads of a TPU, [B, L, N, H], computed as rows of N·H numbers.

    Left to itself, libtpu writes head by head: 128 columns, which fill half of a matrix unit of v6e and 7x. The weight
    is gathered as rows, too: gathered as heads it would be copied. But on v5e 3.6 ms of sums, hidden otherwise, would
    then be waited for in each layer.
    """
    if sums_beside_products():
        weight = gathered(weight)
    (inputs, _), (N, H) = letters.split("->")[0].split(","), weight.shape[:2]
    axes = (None, None, None) if out is None else jax.typeof(weight).sharding.spec
    flat = jnp.reshape(weight, (N * H, *weight.shape[2:]), out_sharding=out and P(axes[0], axes[2]))
    y = _held_in_order(jnp.einsum(f"{inputs},ED->BLE", x, gathered(flat), out_sharding=out and P(*out[:3])))
    return on_tiles(_held_in_order, jnp.reshape(y, (*y.shape[:2], N, H), out_sharding=out))


def on_tiles(function, *arrays: jax.Array) -> jax.Array:
    """function(*arrays) of arrays [B, L, N, H], which works on their last axes and is given them as [B, L/8, N, 8, H].

    So a TPU holds [B, L, N·H] where a head has 128 numbers: in tiles of 8 by 128. What reads and writes whole tiles
    can change their order on the way, where moving the heads before the positions would be a kernel of its own.
    """
    mesh, L = current_mesh(), arrays[0].shape[1]
    if L % (8 if mesh is None else 8 * mesh.shape["context"]):
        return function(*arrays)
    axes = lambda x: (None,) * 4 if mesh is None else jax.typeof(x).sharding.spec

    def tiled(x_BLNH):
        batch, length, heads, last = axes(x_BLNH)
        B, _, N, H = x_BLNH.shape
        x_BMSNH = jnp.reshape(x_BLNH, (B, L // 8, 8, N, H), out_sharding=spec(batch, length, None, heads, last))
        return jnp.swapaxes(x_BMSNH, 2, 3)

    y_BMSNH = jnp.swapaxes(function(*map(tiled, arrays)), 2, 3)
    return jnp.reshape(y_BMSNH, arrays[0].shape, out_sharding=spec(*axes(arrays[0])))


@jax.custom_vjp
def _held_in_order(x: jax.Array) -> jax.Array:
    """x as it is, its last axis the one that lies together in memory; so does that of its gradient."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


_held_in_order.defvjp(lambda x: (_held_in_order(x), None), lambda _, g: (_held_in_order(g),))


def halves(letters: str) -> tuple[str, str]:
    """The letters of a weight that its product contracts, and the others."""
    inputs, weight = letters.split("->")[0].split(",")
    return "".join(a for a in weight if a in inputs), "".join(a for a in weight if a not in inputs)


def inner_axes(name: str) -> int:
    """How many of the last axes of a weight are contracted with the input."""
    return len(halves(PRODUCTS[name])[0])
