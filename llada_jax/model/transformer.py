"""The Transformer: one block described once, scanned over the layers. It knows nothing of noise, losses or training.

B batch, L length, D model width, N query heads, K key heads, H head size, F MLP width, V rows of the vocabulary.
Weights have the published names and are stored (out, in), as in the published checkpoints.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llada_jax.model.attention import Past, attention, window_attention
from llada_jax.model.config import ModelConfig
from llada_jax.model.masks import FULL, Mask
from llada_jax.model.products import PRODUCTS, on_tiles
from llada_jax.model.quantize import product
from llada_jax.parallel.mesh import BATCH, HIDDEN, gather_fsdp, platform, reshard, spec, sum_gradients_first

# What is saved of a layer for its backward pass besides its input, by config.model.remat; the rest is computed again.
# Names: "input" of the layer, "qk" after the rotation, "v", "attention" with its log of sums, "attn_out" and "mlp"
# (both wide matrices of it).
_named = jax.checkpoint_policies.save_only_these_names
_POLICIES = {
    "full": None,
    "attention": _named("attention"),
    "rotated": _named("attention", "qk"),
    "projections": _named("attention", "qk", "v", "attn_out"),
    "matmuls": _named("attention", "qk", "v", "attn_out", "mlp"),
    # The attention output stays: it is named inside a shard_map, where JAX would compute it again instead of moving it.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["attention"], names_which_can_be_offloaded=["input", "qk", "v", "attn_out"],
        offload_src="device", offload_dst="pinned_host",
    ),
}  # fmt: skip


def _weight(key, shape: tuple[int, ...], axes: tuple, std) -> nnx.Param:
    """Normal, cut at three standard deviations; float32; sharded by `axes`."""
    unit = jax.random.truncated_normal(key, -3.0, 3.0, shape, out_sharding=spec(*axes))
    return nnx.Param(unit * std)


def _stds(c: ModelConfig, fan_in: int, depth=None):
    """Standard deviation of a weight; `depth` (layer index from 1) for those that write to the residual stream.

    mitchell (LLaDA): 1/√fan_in, residual writers also ÷ √(2·depth). normal (iLLaDA): init_std, residual writers
    ÷ √(2·layers), embeddings 1/√(2·d_model).
    """
    if c.init == "mitchell":
        return fan_in**-0.5 if depth is None else fan_in**-0.5 / jnp.sqrt(2.0 * depth)
    return c.init_std if depth is None else c.init_std / (2 * c.n_layers) ** 0.5


class Block(nnx.Module):
    """One pre-norm layer: RMSNorm, rotary attention, residual; RMSNorm, SwiGLU, residual."""

    def __init__(self, c: ModelConfig, key: jax.Array, depth):
        D, N, K, H, F = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, c.mlp_hidden_size
        keys = jax.random.split(key, 7)
        self.config = c
        self.attn_norm, self.ff_norm = nnx.Param(jnp.ones(D)), nnx.Param(jnp.ones(D))
        self.q_proj = _weight(keys[0], (N, H, D), ("tensor", None, "fsdp"), _stds(c, D))
        self.k_proj = _weight(keys[1], (K, H, D), ("tensor", None, "fsdp"), _stds(c, D))
        self.v_proj = _weight(keys[2], (K, H, D), ("tensor", None, "fsdp"), _stds(c, D))
        self.attn_out = _weight(keys[3], (D, N, H), ("fsdp", "tensor", None), _stds(c, D, depth))
        self.ff_proj = _weight(keys[4], (F, D), ("tensor", "fsdp"), _stds(c, D))
        self.up_proj = _weight(keys[5], (F, D), ("tensor", "fsdp"), _stds(c, D))
        self.ff_out = _weight(keys[6], (D, F), ("fsdp", "tensor"), _stds(c, F, depth))
        self.lora = nnx.data(None)  # adapters by the weight that they stand beside; see model/lora.py

    def __call__(
        self,
        x_BLD: jax.Array,
        mask: Mask = FULL,
        positions: jax.Array | None = None,
        past: Past | None = None,
        square_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The layer's output, [B, L, D], and its keys (rotated) and values, [B, K, L, H].

        past: keys and values of other positions; the queries see them besides what `mask` says of their own.
        square_BL: `mean_square` of x, where it is known already.
        """
        c, dtype = self.config, self.config.dtype
        heads = spec(BATCH, "context", "tensor", None)
        h_BLD = rms_norm(x_BLD, gather_fsdp(self.attn_norm, x_BLD.dtype), c.rms_norm_eps, square_BL).astype(dtype)
        q, k, v = (jnp.swapaxes(self.times(name, h_BLD, heads), 1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = (checkpoint_name(rope(x, c.rope_theta, positions), "qk") for x in (q, k))
        v = checkpoint_name(v, "v")
        if past is None:
            a_BNLH = attention(q, k, v, mask, c.attention_kernel)
        else:
            a_BNLH = window_attention(q, k, v, past, mask)
        x_BLD += checkpoint_name(self.times("attn_out", a_BNLH, _hidden()), "attn_out")
        return x_BLD + self.mlp(x_BLD), (k, v)

    def mlp(self, x_BLD: jax.Array) -> jax.Array:
        """What the second half of the layer adds to the residual stream, [B, L, D]."""
        c, dtype, wide = self.config, self.config.dtype, spec(BATCH, "context", "tensor")
        weights = {name: getattr(self, name) for name in ("ff_proj", "up_proj", "ff_out")}
        if self.lora is None:  # else they are frozen
            x_BLD, weights = sum_gradients_first(x_BLD, weights)
        h_BLD = rms_norm(x_BLD, gather_fsdp(self.ff_norm, x_BLD.dtype), c.rms_norm_eps).astype(dtype)
        gate_BLF, up_BLF = (
            checkpoint_name(self.times(name, h_BLD, wide, weights[name]), "mlp") for name in ("ff_proj", "up_proj")
        )
        return self.times("ff_out", jax.nn.silu(gate_BLF) * up_BLF, _hidden(), weights["ff_out"])

    def times(self, name: str, x: jax.Array, out: P | None, weight=None) -> jax.Array:
        """The input of a weight times it, in the compute dtype, and what an adapter adds. out: sharding."""
        letters, dtype = PRODUCTS[name], self.config.dtype
        y = product(x, getattr(self, name) if weight is None else weight, letters, dtype, out)
        if self.lora is None or name not in self.lora:
            return y
        return y + self.lora[name](x, letters, dtype, out)


class Transformer(nnx.Module):
    """Token ids to logits. A pytree: jit, grad, vmap and optax take it as it is."""

    def __init__(self, c: ModelConfig, key: jax.Array):
        """Random float32 parameters, born sharded when run under `jax.jit` with a mesh set."""
        keys = jax.random.split(key, 3)
        self.config = c
        rows = (c.embedding_size, c.d_model)
        wte_std = _stds(c, c.d_model) if c.init == "mitchell" else (2 * c.d_model) ** -0.5
        self.wte = _weight(keys[0], rows, ("tensor", "fsdp"), wte_std)
        depths = jnp.arange(1, c.n_layers + 1, dtype=jnp.float32)
        self.blocks = jax.vmap(lambda key, depth: Block(c, key, depth))(jax.random.split(keys[1], c.n_layers), depths)
        self.ln_f = nnx.Param(jnp.ones(c.d_model))
        self.ff_out = None if c.weight_tying else _weight(keys[2], rows, ("tensor", "fsdp"), _stds(c, c.d_model))
        self.lora = nnx.data(None)  # the adapter of the embedding

    @property
    def head(self) -> nnx.Param:
        """The vocabulary matrix, [V, D]."""
        return self.wte if self.ff_out is None else self.ff_out

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """The residual stream before the first layer, [B, L, D]."""
        c = self.config
        # As wide as float32 masters, the residual stream is what PyTorch's autocast computes; in bfloat16 it would be
        # 1.5 times as far from float32 (tests/interop/test_hf.py, autocast). But residual = "compute" takes 10% fewer
        # cycles and 4.6 of 16 GiB less (8B compiled for 16 v5p, 4 rows of 4096 a chip).
        wide = jnp.promote_types(self.wte.dtype, c.dtype)
        # Each device looks up its columns for the rows of all, and the rows change places: moving those is far less
        # than gathering the embedding, and its gradient needs no sum over fsdp. That gradient is summed as wide: half
        # of all tokens are MASK.
        looked_up = self.wte[...].astype(wide).at[reshard(tokens_BL, "data", "context")]
        x_BLD = looked_up.get(out_sharding=spec("data", "context", "fsdp"))
        x_BLD = reshard(x_BLD.astype(wide if c.residual == "parameters" else c.dtype), *HIDDEN)
        return x_BLD if self.lora is None else x_BLD + self.lora.embed(tokens_BL, x_BLD.dtype)

    def norm(self, x_BLD: jax.Array, square_BL: jax.Array | None = None) -> jax.Array:
        """The residual stream after the last layer, normed, in the compute dtype."""
        c = self.config
        return rms_norm(x_BLD, gather_fsdp(self.ln_f, x_BLD.dtype), c.rms_norm_eps, square_BL).astype(c.dtype)

    def hidden(
        self, tokens_BL: jax.Array, mask: Mask | jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """The normed last hidden states, [B, L, D] in the compute dtype.

        mask: which tokens see which, or int32 [B, L], the segment of each token (0 is padding); by default all see all,
        in a causal model all before them. positions: int32 [L] or [B, L], of the rotary embedding; by default 0..L-1.
        """
        c, mask = self.config, own_mask(self.config, mask)

        def layer(carry, block):  # what a norm needs to know of x is summed where x is computed
            x_BLD, square_BL = carry
            x_BLD = block(checkpoint_name(x_BLD, "input"), mask, positions, square_BL=square_BL)[0]
            return (x_BLD, mean_square(x_BLD)), None

        if c.remat != "none":
            layer = jax.checkpoint(layer, prevent_cse=False, policy=_POLICIES[c.remat])
        x_BLD = self.embed(tokens_BL)
        carry, _ = jax.lax.scan(layer, (x_BLD, mean_square(x_BLD)), self.blocks, unroll=_unroll(c))
        return self.norm(*carry)

    def __call__(
        self, tokens_BL: jax.Array, mask: Mask | jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Logits, [B, L, V] in the compute dtype, for int32 token ids [B, L]; see `hidden`."""
        x_BLD = self.hidden(tokens_BL, mask, positions)
        logits = spec(BATCH, "context", "tensor")
        return jnp.einsum("BLD,VD->BLV", x_BLD, gather_fsdp(self.head, x_BLD.dtype), out_sharding=logits)


def own_mask(c: ModelConfig, mask: Mask | jax.Array | None) -> Mask:
    """The mask that a model applies: what is given (segment ids stand for a full mask), causal if the model is."""
    if not isinstance(mask, Mask):
        mask = FULL if mask is None else Mask(segment_ids=mask)
    return dataclasses.replace(mask, kind="causal") if c.causal else mask


def with_config(model: Transformer, c: ModelConfig) -> Transformer:
    """The same parameters, unchanged, under a config that differs in how it is computed."""
    model, blocks = jax.tree.map(lambda x: x, model), jax.tree.map(lambda x: x, model.blocks)
    model.config = blocks.config = c
    model.blocks = blocks
    return model


def parameter_count(c: ModelConfig) -> int:
    """The number of parameters, without memory for them."""
    shapes = jax.eval_shape(lambda key: Transformer(c, key), jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


def _hidden() -> P | None:
    return spec(*HIDDEN)


def _unroll(c: ModelConfig) -> int:
    """Layers a trip of the scan: XLA's CPU loops copy each layer's weights, so a CPU takes several at once.

    Not where layers are computed again: of several in one trip XLA would keep what `remat` wants dropped.
    """
    return min(c.n_layers, 8) if platform() == "cpu" and c.remat == "none" else 1


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float, square_BL: jax.Array | None = None) -> jax.Array:
    """Root-mean-square norm: statistics in float32, cast back, then scaled (the published order).

    square_BL: `mean_square` of x, where it is known already.
    """
    square_BL = mean_square(x_BLD) if square_BL is None else square_BL
    normed_BLD: Any = _over_root(x_BLD, square_BL, eps)
    return scale_D * normed_BLD


def mean_square(x_BLD: jax.Array) -> jax.Array:
    """Of each position, float32 [B, L]. A constant to autodiff: `rms_norm` has its derivative in that of x."""
    x32 = jax.lax.stop_gradient(x_BLD).astype(jnp.float32)
    return jnp.mean(x32 * x32, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _over_root(x_BLD: jax.Array, square_BL: jax.Array, eps: float) -> jax.Array:
    """x / √(square + ε), in the dtype of x; square_BL is its `mean_square`."""
    return (x_BLD.astype(jnp.float32) * jax.lax.rsqrt(square_BL + eps)[..., None]).astype(x_BLD.dtype)


def _over_root_backward(eps: float, kept, dy_BLD: jax.Array):
    x_BLD, square_BL = kept
    root_BL1 = jax.lax.rsqrt(square_BL + eps)[..., None]
    y_BLD, dy32 = x_BLD.astype(jnp.float32) * root_BL1, dy_BLD.astype(jnp.float32)
    dx_BLD = root_BL1 * (dy32 - y_BLD * jnp.mean(dy32 * y_BLD, axis=-1, keepdims=True))
    return dx_BLD.astype(x_BLD.dtype), None


_over_root.defvjp(lambda x, square, eps: (_over_root(x, square, eps), (x, square)), _over_root_backward)


def rope(x_BNLH: jax.Array, theta: float, positions: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding, halves rotated, computed in float32. positions: [L] or [B, L]; 0..L-1 by default."""
    L, H = x_BNLH.shape[-2:]
    positions = jnp.arange(L) if positions is None else positions
    frequency = 1.0 / theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle_xLh = positions.astype(jnp.float32)[..., None] * frequency
    angle_B1Lh = angle_xLh[:, None] if positions.ndim == 2 else angle_xLh[None, None]
    cos, sin = jnp.cos(angle_B1Lh), jnp.sin(angle_B1Lh)
    arrays = x_BNLH, jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    if platform() != "tpu":
        return _turned(*arrays)
    return jnp.swapaxes(on_tiles(_turned, *(jnp.swapaxes(a, 1, 2) for a in arrays)), 1, 2)


@jax.custom_vjp
def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The last axis of x, [x1, x2], turned: x·cos + [x2, x1]·sin, where sin is [-s, s]. Its gradient is turned back."""
    H, x32 = x.shape[-1], x.astype(jnp.float32)
    if platform() == "tpu":  # a matrix unit swaps the halves, exactly; a vector unit would work with half of a register
        swap_HH = jnp.asarray(np.roll(np.eye(H), H // 2, axis=1), x.dtype)
        precision = "highest" if x.dtype == jnp.float32 else None
        swapped = jnp.einsum("...H,HI->...I", x, swap_HH, preferred_element_type=jnp.float32, precision=precision)
    else:
        swapped = jnp.roll(x32, H // 2, axis=-1)
    return (x32 * cos + swapped * sin).astype(x.dtype)


_turned.defvjp(
    lambda x, cos, sin: (_turned(x, cos, sin), (cos, sin)),
    lambda angles, g: (_turned(g, angles[0], -angles[1]), None, None),
)
