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
from llada_jax.parallel.mesh import current_mesh, gather_fsdp, platform

# The products of a block: its input, the weight (outputs first) and the output. B batch, L length, D model width,
# N query heads, K key heads, H head size, F MLP width.
PRODUCTS = {
    "q_proj": "BLD,NHD->BNLH", "k_proj": "BLD,KHD->BKLH", "v_proj": "BLD,KHD->BKLH", "attn_out": "BNLH,DNH->BLD",
    "ff_proj": "BLD,FD->BLF", "up_proj": "BLD,FD->BLF", "ff_out": "BLF,DF->BLD",
}  # fmt: skip


FEW_BITS = ("int8", "int4")
_GROUP = 128  # weights of the last axis that share a scale in int4; the largest common divisor where it has fewer


class Coded(nnx.Module):
    """A weight as values · scale, [out, in]; out and in may be several axes.

    int8: float32 scale [out]. int4: float32 scale [out, in / group], in groups of the last axis. The scales are numbers
    of bfloat16, so that a product in the compute dtype is scaled without another rounding.
    """

    def __init__(self, values: jax.Array, scale: jax.Array):
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)


def product(x: jax.Array, weight: nnx.Param | Coded, letters: str, dtype, out) -> jax.Array:
    """einsum(letters, x, weight) in `dtype`; `letters` is of PRODUCTS, `out` the sharding of the result.

    A scale of int8 belongs to an output channel, so it multiplies the result: no decoded weight is ever stored. One of
    int4 belongs to some inputs, so the weights of a layer are decoded before their product.
    """
    if not isinstance(weight, Coded):
        return times(x, gather_fsdp(weight, dtype), letters, out)
    values = gather_fsdp(weight.values, weight.values.dtype).astype(dtype)  # gathered in few bits
    scale = gather_fsdp(weight.scale, dtype)
    if _is_grouped(weight):
        return times(x, _scaled(values, scale), letters, out)
    y = times(x, values, letters, out)
    (inputs, _), outputs = letters.split("->")[0].split(","), letters.split("->")[1]
    missing = [i for i, letter in enumerate(outputs[1:]) if letter in inputs]  # axes of y that the scale lacks
    return y * jnp.expand_dims(scale, missing)


def times(x: jax.Array, weight: jax.Array, letters: str, out, dtype=None) -> jax.Array:
    """einsum(letters, x, weight), where the contracted axes are the last ones of the weight.

    On one CPU device as weight · xᵀ: XLA's products of 32 columns (a window of a sampler) are 1.3 times as fast so.
    """
    if out is not None or platform() != "cpu":
        return jnp.einsum(letters, x, weight, out_sharding=out, preferred_element_type=dtype)
    (inputs, weights), outputs = letters.split("->")[0].split(","), letters.split("->")[1]
    inner, outer = ("".join(a for a in weights if (a in inputs) == contracted) for contracted in (True, False))
    columns = "".join(a for a in inputs if a not in inner)
    y = jnp.tensordot(
        weight, jnp.einsum(f"{inputs}->{inner}{columns}", x), axes=len(inner), preferred_element_type=dtype
    )
    return jnp.einsum(f"{outer}{columns}->{outputs}", y)


def inner_axes(name: str) -> int:
    """How many of the last axes of a weight are contracted with the input."""
    inputs, weight = PRODUCTS[name].split("->")[0].split(",")
    return sum(letter in inputs for letter in weight)


def quantize(model, kind: str = "int8"):
    """The model with the weights of its blocks as `kind`, of FEW_BITS; embedding, head and norms stay as they are.

    Under `jax.eval_shape` it gives the shapes and shardings of one. Raises InputError for a mesh that splits groups.
    """
    blocks = jax.tree.map(lambda x: x, model.blocks)
    for name in PRODUCTS:
        weight = getattr(blocks, name)
        if not isinstance(weight, Coded):
            if kind == "int4":
                _require_whole_groups(name, weight)
            code = encode(weight[...], inner_axes(name), jnp) if kind == "int8" else encode_groups(weight[...], xp=jnp)
            setattr(blocks, name, Coded(*code))
    model = jax.tree.map(lambda x: x, model)
    model.blocks = blocks
    return model


def _require_whole_groups(name: str, weight) -> None:
    mesh, size = current_mesh(), weight.shape[-1]
    axis = None if mesh is None else jax.typeof(weight[...]).sharding.spec[-1]
    groups = size // math.gcd(_GROUP, size)
    if mesh is not None and axis is not None and groups % mesh.shape[axis]:
        raise InputError(
            f"int4: {name} has {groups} group(s) of {size // groups} inputs, which mesh.{axis}={mesh.shape[axis]} "
            f"would split; mesh.{axis} must divide {groups}, or take int8"
        )


def is_quantized(model) -> bool:
    return isinstance(model.blocks.q_proj, Coded)


def decode(weight: nnx.Param | Coded, inner: int) -> jax.Array:
    """The weight in float32."""
    if not isinstance(weight, Coded):
        return weight[...].astype(jnp.float32)
    values, scale = weight.values[...].astype(jnp.float32), weight.scale[...]
    return _scaled(values, scale) if _is_grouped(weight) else values * jnp.expand_dims(scale, tuple(range(-inner, 0)))


def _is_grouped(weight: Coded) -> bool:
    return weight.scale.ndim == weight.values.ndim


def _scaled(values: jax.Array, scale: jax.Array) -> jax.Array:
    """values [..., in] · scale [..., in / group]."""
    grouped = values.reshape(*scale.shape, values.shape[-1] // scale.shape[-1])
    return (grouped * scale[..., None]).reshape(values.shape)


def encode(weight, inner: int, xp=np):
    """(values int8, scale float32 [out]) of a weight whose last `inner` axes are in; by NumPy or jax.numpy."""
    return _encode(weight.astype(xp.float32), tuple(range(-inner, 0)), 127, xp.int8, xp)


def encode_groups(weight, group: int = 0, xp=np):
    """(values int4, scale float32 [out, in / group]) of a weight [out, in]; 0: `_GROUP` or less for the last axis."""
    group = group or math.gcd(_GROUP, weight.shape[-1])
    grouped = weight.astype(xp.float32).reshape(*weight.shape[:-1], weight.shape[-1] // group, group)
    values, scale = _encode(grouped, (-1,), 7, jnp.int4, xp)
    return values.reshape(weight.shape), scale


def _encode(weight, axes: tuple[int, ...], most: int, dtype, xp):
    scale = (xp.max(xp.abs(weight), axis=axes) / most).astype(jnp.bfloat16).astype(xp.float32)
    steps = weight / xp.expand_dims(xp.where(scale > 0, scale, 1), axes)
    return xp.clip(xp.round(steps), -most, most).astype(dtype), scale
