"""Weights of the blocks in 8 or 4 bits, with one scale an output channel (int8) or a group of inputs (int4).

Why not qwix: it knows a weight by the nnx.Param that an einsum is given, where ours were cast and gathered before, and
its products of quantised arrays take no `out_sharding`, which an Explicit mesh asks for (0.1.8).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llada_jax.fields import InputError
from llada_jax.model.products import PRODUCTS, halves, inner_axes, times
from llada_jax.parallel.mesh import current_mesh, gather_fsdp

FEW_BITS = ("int8", "int4")
_GROUP = 128  # inputs that share a scale in int4; the largest common divisor where the last axis has fewer


class Coded(nnx.Module):
    """A weight [out, in] as values · scale; out and in may be several axes.

    int8: values [out, in], float32 scale [out]. int4: values [in / group, group, out], float32 scale [in / group, out],
    in groups of the last axis. That order is why: on v5e a product then takes the time of one in int8 (0.15 ms for 256
    rows of 4096 x 12288); as [out, in / group, group] it would take 3.5 times as long, as [out, in] 12 times. The
    scales are numbers of bfloat16, so that a product in the compute dtype is scaled without another rounding.
    """

    def __init__(self, values: jax.Array, scale: jax.Array):
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)

    @property
    def is_grouped(self) -> bool:
        return self.values.dtype == jnp.int4


def product(x: jax.Array, weight: nnx.Param | Coded, letters: str, dtype, out) -> jax.Array:
    """einsum(letters, x, weight) in `dtype`; `letters` is of PRODUCTS, `out` the sharding of the result.

    A scale of int8 belongs to an output channel, so it multiplies the result, one of int4 the weights as they are read:
    no decoded weight is ever stored.
    """
    if not isinstance(weight, Coded):
        return times(x, weight[...].astype(dtype), letters, out)
    values = gather_fsdp(weight.values, weight.values.dtype).astype(dtype)  # gathered in few bits
    scale = gather_fsdp(weight.scale, dtype)
    (inputs, _), outputs = letters.split("->")[0].split(","), letters.split("->")[1]
    if weight.is_grouped:
        inner, outer = halves(letters)
        x = x.reshape(*x.shape[:-1], *values.shape[len(inner) - 1 : len(inner) + 1])
        weights = values * jnp.expand_dims(scale, len(inner))
        return jnp.einsum(f"{inputs}g,{inner}g{outer}->{outputs}", x, weights, out_sharding=out)
    y = times(x, values, letters, out)
    missing = [i for i, letter in enumerate(outputs[1:]) if letter in inputs]  # axes of y that the scale lacks
    return y * jnp.expand_dims(scale, missing)


def quantize(model, kind: str = "int8"):
    """The model with the weights of its blocks as `kind`, of FEW_BITS; embedding, head and norms stay as they are.

    Under `jax.eval_shape` it gives the shapes and shardings of one. Raises InputError for a mesh that splits groups.
    """
    blocks = jax.tree.map(lambda x: x, model.blocks)
    for name in PRODUCTS:
        weight = getattr(blocks, name)
        if not isinstance(weight, Coded):
            code = encode(weight[...], inner_axes(name), jnp) if kind == "int8" else _grouped(weight[...], name)
            setattr(blocks, name, Coded(*code))
    model = jax.tree.map(lambda x: x, model)
    model.blocks = blocks
    return model


def is_quantized(model) -> bool:
    return isinstance(model.blocks.q_proj, Coded)


def shape_of(weight: nnx.Param | Coded, name: str) -> tuple[int, ...]:
    """The shape of a weight of a block as it was before it was coded, the layers first."""
    if not isinstance(weight, Coded):
        return weight.shape
    layers, *shape = weight.values.shape
    if not weight.is_grouped:
        return (layers, *shape)
    inner = inner_axes(name)
    return (layers, *shape[inner + 1 :], *shape[: inner - 1], shape[inner - 1] * shape[inner])


def decode(weight: nnx.Param | Coded, name: str) -> jax.Array:
    """The weight in float32, its axes as they are held."""
    if not isinstance(weight, Coded):
        return weight[...].astype(jnp.float32)
    inner, outer = halves(PRODUCTS[name])
    axes = (-1 - len(outer),) if weight.is_grouped else tuple(range(-len(inner), 0))
    return weight.values[...].astype(jnp.float32) * jnp.expand_dims(weight.scale[...], axes)


def encode(weight, inner: int, xp=np):
    """(values int8, scale float32 [out]) of a weight whose last `inner` axes are in; by NumPy or jax.numpy."""
    return _encode(weight.astype(xp.float32), tuple(range(-inner, 0)), 127, xp.int8, xp)


def encode_groups(weight, group: int, xp=np):
    """(values int4 [..., in / group, group], scale float32 [..., in / group]) of a weight [..., in]."""
    grouped = weight.astype(xp.float32).reshape(*weight.shape[:-1], weight.shape[-1] // group, group)
    return _encode(grouped, (-1,), 7, jnp.int4, xp)


def _grouped(weight: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """The values and the scale of a `Coded` of int4, the layers first."""
    mesh, size, outer = current_mesh(), weight.shape[-1], len(halves(PRODUCTS[name])[1])
    group = math.gcd(_GROUP, size)
    axis = None if mesh is None else jax.typeof(weight).sharding.spec[-1]
    if mesh is not None and axis is not None and size // group % mesh.shape[axis]:
        raise InputError(
            f"int4: {name} has {size // group} group(s) of {group} inputs, which mesh.{axis}={mesh.shape[axis]} would "
            f"split; it must divide {size // group}, or take int8"
        )
    values, scale = encode_groups(weight, group, jnp)
    last = lambda x: jnp.moveaxis(x, range(1, 1 + outer), range(-outer, 0))
    return last(values), last(scale)


def _encode(weight, axes: tuple[int, ...], most: int, dtype, xp):
    scale = (xp.max(xp.abs(weight), axis=axes) / most).astype(jnp.bfloat16).astype(xp.float32)
    steps = weight / xp.expand_dims(xp.where(scale > 0, scale, 1), axes)
    return xp.clip(xp.round(steps), -most, most).astype(dtype), scale
