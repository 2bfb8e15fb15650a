"""Low-rank adapters beside frozen weights: y = x Wᵀ + scale · (x Aᵀ) Bᵀ (LoRA, arXiv 2106.09685).

The weights of the blocks can carry one, and the embedding. Several adapters on one weight are one of their ranks put
together: the scale is an array over the rank. R rank; other letters as in products.PRODUCTS.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llada_jax.config import Lora
from llada_jax.fields import InputError
from llada_jax.model.products import PRODUCTS, halves, inner_axes
from llada_jax.model.quantize import FEW_BITS, Coded, decode, quantize, shape_of
from llada_jax.parallel.mesh import BATCH, HIDDEN, gather_fsdp, reshard, spec

TARGETS = (*PRODUCTS, "wte")
_AXES = {"D": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"}  # of the mesh, that split a weight's


class Adapter(nnx.Module):
    """A [R, in], B [out, R] and scale [R], all float32; in a block each has the layers before.

    A scale of 0 marks a rank that a layer does not have. With a key, inputs are dropped at `rate` and the others grow
    by 1 / (1 - rate); see `dropping`.
    """

    def __init__(self, A: jax.Array, B: jax.Array, scale: jax.Array, rate: float = 0.0):
        self.A, self.B, self.scale = nnx.Param(A), nnx.Param(B), nnx.Param(scale)
        self.rate: float = rate
        self.key: jax.Array | None = nnx.data(None)

    def __call__(self, x: jax.Array, letters: str, dtype, out) -> jax.Array:
        """What the adapter adds to einsum(letters, x, weight), in `dtype`."""
        inner, outer = halves(letters)
        x_letters, y_letters = letters.split(",")[0], letters.split("->")[1]
        if self.key is not None:
            x = _dropped(x, self.key, self.rate)
        tokens = spec(BATCH, "context", None)
        low_BLR = jnp.einsum(f"{x_letters},R{inner}->BLR", x, gather_fsdp(self.A, dtype), out_sharding=tokens)
        return jnp.einsum(f"BLR,{outer}R->{y_letters}", low_BLR, self._scaled(dtype), out_sharding=out)

    def embed(self, tokens_BL: jax.Array, dtype) -> jax.Array:
        """What the adapter adds to the embedding of tokens, [B, L, D]; dropout does not apply, as in PEFT."""
        looked_up = self.A[...].T.at[reshard(tokens_BL, BATCH, "context")]
        low_BLR = looked_up.get(out_sharding=spec(BATCH, "context", None)).astype(dtype)
        return jnp.einsum("BLR,DR->BLD", low_BLR, self._scaled(dtype), out_sharding=spec(*HIDDEN))

    def _scaled(self, dtype) -> jax.Array:
        """scale · B, multiplied before the rounding to the compute dtype."""
        return gather_fsdp(self.B[...] * self.scale[...], dtype)


def attach(model, c: Lora, key: jax.Array):
    """The model with fresh adapters on every weight that `c.targets` names; it computes what it did before.

    In a block A ~ U(±1/√in) and B = 0; for the embedding A = 0 and B ~ N(0, 1): the values of PEFT. Raises InputError
    for a target that cannot carry one.
    """
    require_targets(c.targets)
    scale = c.alpha / (math.sqrt(c.rank) if c.rslora else c.rank)
    made = {}
    for i, name in enumerate(c.targets):
        own = jax.random.fold_in(key, i)
        (shape_A, shape_B), (spec_A, spec_B) = shapes(model, name, c.rank), sharding(name)
        if name == "wte":
            ranks: tuple[int, ...] = (c.rank,)
            A, B = jnp.zeros(shape_A, out_sharding=spec_A), jax.random.normal(own, shape_B, out_sharding=spec_B)
        else:
            ranks, bound = shape_A[:2], math.prod(shape_A[2:]) ** -0.5
            A = jax.random.uniform(own, shape_A, minval=-bound, maxval=bound, out_sharding=spec_A)
            B = jnp.zeros(shape_B, out_sharding=spec_B)
        made[name] = Adapter(A, B, jnp.full(ranks, scale), c.dropout)
    return with_adapters(model, made)


def frozen_base(model, base: str):
    """The model as config.lora.base holds it: "float32", "bfloat16", or one of FEW_BITS with the rest in bfloat16."""
    model = jax.tree.map(lambda x: x.astype("float32" if base == "float32" else "bfloat16"), model)
    return quantize(model, base) if base in FEW_BITS else model


def with_adapters(model, adapters: dict[str, Adapter]):
    """The model with these adapters in the place of those that it has; none: the base alone."""
    model, blocks = jax.tree.map(lambda x: x, model), jax.tree.map(lambda x: x, model.blocks)
    inner = {name: adapter for name, adapter in adapters.items() if name != "wte"}
    blocks.lora = nnx.Dict(inner) if adapters else nnx.data(None)  # with adapters, even of others, a block is frozen
    model.blocks, model.lora = blocks, adapters.get("wte", nnx.data(None))
    return model


def adapters_of(model) -> dict[str, Adapter]:
    """The adapters by target; {} of a plain model."""
    of_blocks = {} if model.blocks.lora is None else model.blocks.lora
    found = {name: of_blocks[name] for name in PRODUCTS if name in of_blocks}
    return found if model.lora is None else found | {"wte": model.lora}


def is_trainable(name: str) -> bool:
    """Whether a parameter, by its name in a checkpoint, is one that LoRA trains."""
    return name.startswith(("lora.", "blocks.lora.")) and name.endswith((".A", ".B"))


def combined(first: dict[str, Adapter], second: dict[str, Adapter]) -> dict[str, Adapter]:
    """The adapters whose effect is the sum of both."""
    result = first | second
    for name in first.keys() & second.keys():
        a, b, rank = first[name], second[name], 0 if name == "wte" else 1
        join = lambda x, y, axis: jnp.concatenate([x[...], y[...]], axis)
        result[name] = Adapter(join(a.A, b.A, rank), join(a.B, b.B, -1), join(a.scale, b.scale, -1))
    return result


def dropping(model, key: jax.Array):
    """The model with dropout before its adapters, drawn from `key`; the model itself where none has a rate."""
    adapters = {name: adapter for name, adapter in adapters_of(model).items() if adapter.rate and name != "wte"}
    if not adapters:
        return model
    layers = model.config.n_layers
    for i, (name, adapter) in enumerate(adapters.items()):
        adapters[name] = jax.tree.map(lambda x: x, adapter)
        adapters[name].key = jax.random.split(jax.random.fold_in(key, i), layers)
    return with_adapters(model, adapters_of(model) | adapters)


def merge(model):
    """(the plain model whose weights are W + scale·B·A, largest change of a weight relative to its largest entry).

    The sum is formed in float32 and cast to the dtype of the weight, a layer at a time. Raises InputError for a
    quantised base, and for an adapter of an embedding that is also the head.
    """
    blocks, plain = jax.tree.map(lambda x: x, model.blocks), with_adapters(model, {})
    blocks.lora, most = nnx.data(None), 0.0
    for name, adapter in adapters_of(model).items():
        weight = model.wte if name == "wte" else getattr(blocks, name)
        if isinstance(weight, Coded):
            raise InputError("the base is quantised; merge into the one that it was made of: load without quantize")
        if name == "wte" and model.ff_out is None:
            raise InputError("the embedding is also the head, which its adapter does not change; it cannot be merged")
        fused, change = jax.jit(_fused_embedding if name == "wte" else _fused)(weight[...], adapter)
        setattr(plain if name == "wte" else blocks, name, nnx.Param(fused))
        most = max(most, float(change))
    plain.blocks = blocks
    return plain, most


def _fused(weight, adapter: Adapter):
    def layer(parts):
        W, A, B, scale = parts
        W32 = W.astype(jnp.float32)
        delta = jnp.tensordot(B * scale, A, 1)
        change = jnp.max(jnp.abs(delta)) / jnp.max(jnp.abs(W32))
        return (W32 + delta).astype(W.dtype), change

    fused, change = jax.lax.map(layer, (weight, adapter.A[...], adapter.B[...], adapter.scale[...]))
    return fused, jnp.max(change)


def _fused_embedding(weight, adapter: Adapter):
    delta_VD = (adapter.A[...].T * adapter.scale[...]) @ adapter.B[...].T
    change = jnp.max(jnp.abs(delta_VD)) / jnp.max(jnp.abs(weight.astype(jnp.float32)))
    return (weight.astype(jnp.float32) + delta_VD).astype(weight.dtype), change


def relative_size(model) -> tuple[jax.Array, jax.Array]:
    """(mean, largest) over weights and layers of |scale·B·A| / |W|, Frobenius norms: what adapters have changed so far.

    By |B·A|² = tr(A·Aᵀ · Bᵀ·B), so that no product is formed; of the weights a layer at a time is decoded.
    """
    found = []
    for name, adapter in adapters_of(model).items():
        if name == "wte":
            found.append(_ratio(name, model.wte, adapter.A[...], adapter.B[...] * adapter.scale[...])[None])
            continue
        layer = lambda parts, name=name: _ratio(name, parts[0], parts[1], parts[2] * parts[3])
        parts = getattr(model.blocks, name), adapter.A[...], adapter.B[...], adapter.scale[...]
        found.append(jax.lax.map(layer, parts))
    ratios = jnp.concatenate(found)
    return jnp.mean(ratios), jnp.max(ratios)


def _ratio(name: str, weight, A, B):
    (inner, outer), whole = ("V", "D") if name == "wte" else halves(PRODUCTS[name]), spec(None, None)
    A_RS = jnp.einsum(f"R{inner},S{inner}->RS", A, A, out_sharding=whole)
    B_RS = jnp.einsum(f"{outer}R,{outer}S->RS", B, B, out_sharding=whole)
    return jnp.sqrt(jnp.sum(A_RS * B_RS) / jnp.sum(decode(weight, name) ** 2))


def require_targets(targets) -> None:
    """Raises InputError for a name that is no target, or one that occurs twice."""
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets or len(set(targets)) < len(targets):
        raise InputError(f"config.lora.targets {tuple(targets)!r}: must be different ones of {', '.join(TARGETS)}")


def shapes(model, name: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a weight of this model, the layers before where it is in a block."""
    if name == "wte":
        V, D = model.wte.shape
        return (rank, V), (D, rank)
    layers, *shape = shape_of(getattr(model.blocks, name), name)
    inner = inner_axes(name)
    return (layers, rank, *shape[-inner:]), (layers, *shape[:-inner], rank)


def sharding(name: str):
    """How A and B lie on the mesh, as specs: as the axes of the weight do; None without a mesh."""
    if name == "wte":
        return spec(None, None), spec("fsdp", None)
    inner, outer = halves(PRODUCTS[name])
    return spec(None, None, *map(_AXES.get, inner)), spec(None, *map(_AXES.get, outer), None)


def _dropped(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=_sharding_of(x))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def _sharding_of(x: jax.Array):
    return None if spec() is None else jax.typeof(x).sharding.spec
