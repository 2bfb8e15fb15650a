"""The passes of a sampler: over a whole canvas, keeping keys and values, or over a window of it beside what was kept.

B rows, S columns of the canvas, W columns of a window, D model width, K key heads, H head size, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llada_jax.model.attention import Past
from llada_jax.model.masks import FULL, Mask
from llada_jax.model.products import times
from llada_jax.model.quantize import is_quantized
from llada_jax.model.transformer import Block, Transformer, own_mask
from llada_jax.parallel.mesh import BATCH, current_mesh, gather_fsdp, platform, reshard, spec

# Keys (rotated) [B, K, H, S] and values [B, K, S, H] of all layers: stacked, or a tuple of layers.
Keys = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    """A model as a sampler reads it: matrices in the compute dtype, gathered over fsdp once and not in every pass.

    layers: one Block whose arrays are stacked over the layers, or a tuple of one each.
    """

    model: Transformer  # for its embedding, last norm and config
    layers: Any
    head_VD: jax.Array

    @property
    def config(self):
        return self.model.config


def prepare(model: Transformer | Weights, gather: bool = True) -> Weights:
    """The weights of a model for sampling; `generate` takes them in its place, so that many calls prepare them once.

    gather: whether to gather them over fsdp. Without it every pass gathers a layer at a time, as training does: for
    models that do not fit on a device. On a CPU the layers are unstacked, since a loop over a stack copies each.
    """
    if isinstance(model, Weights):
        return model
    unstack = platform() == "cpu"
    mesh = current_mesh()
    gather = gather and mesh is not None and mesh.shape["fsdp"] > 1
    cast = not is_quantized(model) and model.blocks.q_proj.dtype != jnp.dtype(model.config.dtype)
    if not (unstack or gather or cast):
        return Weights(model, model.blocks, model.head[...])
    return jax.jit(_prepared, static_argnums=(1, 2))(model, gather, unstack)


def _prepared(model: Transformer, gather: bool, unstack: bool) -> Weights:
    def matrix(x):
        dtype = x.dtype if x.dtype in (jnp.int8, jnp.int4) else model.config.dtype
        return gather_fsdp(x, dtype) if gather else x[...].astype(dtype)

    def of_block(path, x):
        is_norm = any("norm" in str(getattr(key, "name", "")) for key in path)
        return x if is_norm else matrix(x)

    layers = blocks = jax.tree_util.tree_map_with_path(of_block, model.blocks)
    if unstack:
        layers = tuple(jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(model.config.n_layers))
    return Weights(model, layers, matrix(model.head))


def full_pass(
    w: Weights, tokens_BS: jax.Array, mask: Mask, positions_BS: jax.Array, keep: bool
) -> tuple[jax.Array, Keys | None]:
    """The normed hidden states [B, S, D], and with `keep` the keys and values of every column."""
    mask = own_mask(w.config, mask)

    def layer(x_BSD, block: Block):
        x_BSD, kept = block(x_BSD, mask, positions_BS)
        return x_BSD, _whole_rows(kept) if keep else None

    x_BSD, kept = _over_layers(layer, w.model.embed(tokens_BS), w.layers)
    return w.model.norm(x_BSD), kept if keep else None


def window_pass(
    w: Weights, tokens_BW: jax.Array, positions_BW: jax.Array, keys: Keys, visible_BS: jax.Array, mask: Mask = FULL
) -> tuple[jax.Array, Keys]:
    """The normed hidden states of a window [B, W, D], and its own keys and values.

    visible: bool [B, S], the columns that the window sees as they were kept; mask: what it sees of itself.
    """

    def layer(x_BWD, block_and_past):
        block, (k, v) = block_and_past
        x_BWD, kept = block(x_BWD, mask, positions_BW, Past(k, v, visible_BS))
        return x_BWD, _whole_rows(kept)

    x_BWD, kept = _over_layers(layer, w.model.embed(tokens_BW), w.layers, keys)
    return w.model.norm(x_BWD), kept


def write_window(keys: Keys, new: Keys, first: jax.Array) -> Keys:
    """The keys and values with those of a window put in their place, from column `first` on."""
    put = lambda axis: lambda kept, own: jax.lax.dynamic_update_slice_in_dim(kept, own, first, axis=axis)
    return jax.tree.map(put(-1), keys[0], new[0]), jax.tree.map(put(-2), keys[1], new[1])


def logits(w: Weights, hidden_BWD: jax.Array) -> jax.Array:
    """float32 [B, W, V]."""
    head_VD = w.head_VD.astype(hidden_BWD.dtype)
    return times(hidden_BWD, head_VD, "BWD,VD->BWV", spec(BATCH), jnp.float32)


def _over_layers(layer, x, layers, *more):
    """`layer` from the first to the last: a scan over a stack, or plain calls."""
    if not isinstance(layers, tuple):
        return jax.lax.scan(layer, x, (layers, more[0]) if more else layers)
    outs = []
    for i, block in enumerate(layers):
        x, out = layer(x, (block, (more[0][0][i], more[0][1][i])) if more else block)
        outs.append(out)
    return x, tuple(zip(*outs, strict=True)) if outs[0] is not None else None


def _whole_rows(kept: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a row on each device that works on it, as `Past` holds them; heads stay split over tensor."""
    k, v = (reshard(x, BATCH, "tensor", None, None) for x in kept)
    return jnp.swapaxes(k, -1, -2), v
