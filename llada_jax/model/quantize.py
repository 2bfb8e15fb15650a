"""Weights of the blocks in 8 bits: int8 with one scale an output channel, decoded by the matrix product itself.

Why not qwix: it knows a weight by the nnx.Param that an einsum is given, where ours were cast and gathered before, and
its products of quantised arrays take no `out_sharding`, which an Explicit mesh asks for (0.1.8).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llada_jax.parallel.mesh import gather_fsdp, platform

# The products of a block: its input, the weight (outputs first) and the output. B batch, L length, D model width,
# N query heads, K key heads, H head size, F MLP width.
PRODUCTS = {
    "q_proj": "BLD,NHD->BNLH", "k_proj": "BLD,KHD->BKLH", "v_proj": "BLD,KHD->BKLH", "attn_out": "BNLH,DNH->BLD",
    "ff_proj": "BLD,FD->BLF", "up_proj": "BLD,FD->BLF", "ff_out": "BLF,DF->BLD",
}  # fmt: skip


class Int8(nnx.Module):
    """A weight as values · scale: int8 [out, in] and float32 [out]; out and in may be several axes.

    The scales are numbers of bfloat16, so that a product in the compute dtype is scaled without another rounding.
    """

    def __init__(self, values: jax.Array, scale: jax.Array):
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)


def product(x: jax.Array, weight: nnx.Param | Int8, letters: str, dtype, out) -> jax.Array:
    """einsum(letters, x, weight) in `dtype`; `letters` is of PRODUCTS, `out` the sharding of the result.

    A scale belongs to an output channel, so it multiplies the result: no decoded weight is ever stored.
    """
    if not isinstance(weight, Int8):
        return times(x, gather_fsdp(weight, dtype), letters, out)
    values = gather_fsdp(weight.values, jnp.int8).astype(dtype)  # gathered as bytes
    y = times(x, values, letters, out)
    (inputs, _), outputs = letters.split("->")[0].split(","), letters.split("->")[1]
    scale = gather_fsdp(weight.scale, dtype)
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


def quantize(model):
    """The model with the weights of its blocks in int8; embedding, head and norms stay as they are.

    Under `jax.eval_shape` it gives the shapes and shardings of one.
    """
    blocks = jax.tree.map(lambda x: x, model.blocks)
    for name in PRODUCTS:
        weight = getattr(blocks, name)
        if not isinstance(weight, Int8):
            setattr(blocks, name, Int8(*encode(weight[...], inner_axes(name), jnp)))
    model = jax.tree.map(lambda x: x, model)
    model.blocks = blocks
    return model


def is_quantized(model) -> bool:
    return isinstance(model.blocks.q_proj, Int8)


def decode(weight: nnx.Param | Int8, inner: int) -> jax.Array:
    """The weight in float32."""
    if not isinstance(weight, Int8):
        return weight[...].astype(jnp.float32)
    return weight.values[...].astype(jnp.float32) * jnp.expand_dims(weight.scale[...], tuple(range(-inner, 0)))


def encode(weight, inner: int, xp=np):
    """(values int8, scale float32 [out]) of a weight whose last `inner` axes are in; by NumPy or jax.numpy."""
    axes = tuple(range(-inner, 0))
    weight = weight.astype(xp.float32)
    scale = (xp.max(xp.abs(weight), axis=axes) / 127).astype(jnp.bfloat16).astype(xp.float32)
    steps = weight / xp.expand_dims(xp.where(scale > 0, scale, 1), axes)
    return xp.clip(xp.round(steps), -127, 127).astype(xp.int8), scale
