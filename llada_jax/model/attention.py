"""Attention for every mask of masks.py, by the kernel of the platform.

Kernels: "splash" on TPUs (Pallas, in JAX), "cudnn" on GPUs, "xla" anywhere; only the last makes the L×S scores.
B batch, L length (queries), S length (keys), N query heads, K key heads, G query heads a key head, H head size.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from llada_jax.fields import InputError
from llada_jax.model.masks import FULL, Mask, order, visible
from llada_jax.parallel.mesh import BATCH, TOKENS, current_mesh, platform, reshard, spec

# The first of each platform is what "auto" takes; the others serve, too, when asked for by name.
# "splash_interpret" is the TPU kernel in Pallas' interpreter: slow, for tests.
_KERNELS = {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla"), "cpu": ("xla", "splash_interpret")}


def kernel_for(name: str, platform: str, dtype="bfloat16") -> str:
    """The kernel that `config.model.attention_kernel` means on "cpu", "gpu" or "tpu"; logs name it.

    Raises InputError when the one asked for can't serve there.
    """
    served = _KERNELS.get(platform, ("xla",))
    if dtype == "float32":  # cuDNN has none
        served = tuple(kernel for kernel in served if kernel != "cudnn")
    if name == "auto":
        return served[0]
    if name not in served:
        raise InputError(
            f"config.model.attention_kernel {name!r} can't serve {dtype} on {platform}; there: {', '.join(served)}"
        )
    return name


def attention(
    q_BNLH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask = FULL,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention, [B, N, L, H] in the dtype of q. Scores and softmax are float32.

    Outputs of padding queries are finite and of no use: "xla" and "cudnn" let them see all that is not padding, as the
    official code does, "splash" lets them see padding. Raises InputError for a kernel that can't serve here.
    """
    kernel = kernel_for(kernel, platform(), q_BNLH.dtype.name)
    if kernel == "xla":
        return checkpoint_name(_xla(q_BNLH, k_BKSH, v_BKSH, mask), "attention")
    if kernel == "cudnn":
        return checkpoint_name(_per_device(_cudnn, q_BNLH, k_BKSH, v_BKSH, mask), "attention")
    if mask.positions is not None and mask.kind != "full":
        raise InputError(f"splash attention takes no positions for {mask.kind} masks; use the kernel 'xla'")
    return _per_device(functools.partial(_splash, interpret=kernel == "splash_interpret"), q_BNLH, k_BKSH, v_BKSH, mask)


class Past(NamedTuple):
    """Keys and values of other positions, computed before; a query of a window sees them besides its window.

    Both are held as right factors of its products, so that no pass transposes them.
    """

    k_BKHS: jax.Array
    v_BKSH: jax.Array
    visible_BS: jax.Array  # bool [B, S]


def window_attention(q_BNWH, k_BKWH, v_BKWH, past: Past, mask: Mask = FULL) -> jax.Array:
    """Attention of W queries over their own keys (`mask`) and past ones, [B, N, W, H]: one softmax over two parts.

    The parts are never concatenated: the past is read where it lies. Plain XLA on every platform, since W is small.
    """
    B, N, W, H = q_BNWH.shape
    K = k_BKWH.shape[1]
    grouped = spec(BATCH, "tensor", None, None, None)
    q_BKGWH = jnp.reshape(q_BNWH, (B, K, N // K, W, H), out_sharding=grouped)
    lowest = jnp.finfo(jnp.float32).min
    score = lambda k, letters: (
        jnp.einsum(f"BKGWH,{letters}->BKGWS", q_BKGWH, k, preferred_element_type=jnp.float32) * H**-0.5
    )
    own_BKGWW, past_BKGWS = score(k_BKWH, "BKSH"), score(past.k_BKHS, "BKHS")
    past_BKGWS = jnp.where(past.visible_BS[:, None, None, None], past_BKGWS, lowest)
    own_BWW = visible(mask, W, W)
    if own_BWW is not None:
        own_BKGWW = jnp.where(own_BWW[:, None, None], own_BKGWW, lowest)
    top = jnp.maximum(jnp.max(own_BKGWW, axis=-1), jnp.max(past_BKGWS, axis=-1))[..., None]
    own_BKGWW, past_BKGWS = jnp.exp(own_BKGWW - top), jnp.exp(past_BKGWS - top)
    total = jnp.sum(own_BKGWW, axis=-1, keepdims=True) + jnp.sum(past_BKGWS, axis=-1, keepdims=True)
    mix = lambda weights, v: jnp.einsum(
        "BKGWS,BKSH->BKGWH", weights.astype(v.dtype), v, out_sharding=grouped, preferred_element_type=jnp.float32
    )
    out = ((mix(own_BKGWW, v_BKWH) + mix(past_BKGWS, past.v_BKSH)) / total).astype(q_BNWH.dtype)
    return jnp.reshape(out, (B, N, W, H), out_sharding=spec(BATCH, "tensor", None, None))


def _xla(q_BNLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: Mask) -> jax.Array:
    """The plain reference; over a mesh the compiler divides it."""
    k_BKSH, v_BKSH = (reshard(x, BATCH, "tensor", None, None) for x in (k_BKSH, v_BKSH))  # context: gather
    B, N, L, H = q_BNLH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGLH = jnp.reshape(q_BNLH, (B, K, N // K, L, H), out_sharding=_grouped())
    out = _softmax_mix(q_BKGLH, k_BKSH, v_BKSH, visible(_gathered(mask), L, S))
    return jnp.reshape(out, (B, N, L, H), out_sharding=spec(BATCH, "tensor", "context", None))


def _grouped():
    return spec(BATCH, "tensor", None, "context", None)


@jax.custom_vjp
def _softmax_mix(q_BKGLH, k_BKSH, v_BKSH, visible_BLS):
    """softmax(q · k / √H) · v. Its gradient goes over the scores once less than JAX's, and keeps them once.

    The sum in the softmax's gradient, over keys, of weight times the weight's gradient is, in exact arithmetic, that
    over H of output times the output's gradient (FlashAttention-2, arXiv 2307.08691, section 3.1.2).
    """
    return _softmax_mix_forward(q_BKGLH, k_BKSH, v_BKSH, visible_BLS)[0]


def _softmax_mix_forward(q_BKGLH, k_BKSH, v_BKSH, visible_BLS):
    q_BKGLH = q_BKGLH * q_BKGLH.shape[-1] ** -0.5
    scores = jnp.einsum("BKGLH,BKSH->BKGLS", q_BKGLH, k_BKSH, preferred_element_type=jnp.float32)
    if visible_BLS is not None:
        scores = jnp.where(visible_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    shares_BKGLS = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total_BKGL1 = jnp.sum(shares_BKGLS, axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "BKGLS,BKSH->BKGLH", shares_BKGLS.astype(v_BKSH.dtype), v_BKSH, out_sharding=_grouped(),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out = (mixed / total_BKGL1).astype(v_BKSH.dtype)
    return out, (q_BKGLH, k_BKSH, v_BKSH, visible_BLS, shares_BKGLS, total_BKGL1, out)


def _softmax_mix_backward(kept, d_out):
    q_BKGLH, k_BKSH, v_BKSH, visible_BLS, shares_BKGLS, total_BKGL1, out = kept
    dtype, keys = q_BKGLH.dtype, spec(BATCH, "tensor", None, None)
    of_keys = lambda x_BKGLS, y_BKGLH: jnp.einsum(
        "BKGLS,BKGLH->BKSH", x_BKGLS.astype(dtype), y_BKGLH, out_sharding=keys
    )
    d_mixed = (d_out / total_BKGL1).astype(dtype)
    d_v = of_keys(shares_BKGLS, d_mixed)
    d_shares = jnp.einsum("BKGLH,BKSH->BKGLS", d_mixed, v_BKSH, preferred_element_type=jnp.float32)
    d_total = jnp.sum(d_mixed.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_scores = (shares_BKGLS * (d_shares - d_total)).astype(dtype)
    if visible_BLS is not None:
        d_scores = jnp.where(visible_BLS[:, None, None], d_scores, 0)
    d_q = jnp.einsum("BKGLS,BKSH->BKGLH", d_scores, k_BKSH, out_sharding=_grouped())
    return d_q * q_BKGLH.shape[-1] ** -0.5, of_keys(d_scores, q_BKGLH), d_v, None


_softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def _gathered(mask: Mask) -> Mask:
    """The mask with what concerns the keys gathered over `context`."""

    def gather(own, keys):
        x = own if keys is None else keys
        return None if x is None else reshard(x, BATCH, None)

    return dataclasses.replace(
        mask,
        key_segment_ids=gather(mask.segment_ids, mask.key_segment_ids),
        key_positions=gather(mask.positions, mask.key_positions),
    )


def _per_device(kernel, q_BNLH, k_BKSH, v_BKSH, mask: Mask) -> jax.Array:
    """`kernel` on each device's rows, heads and queries. Keys and values of the row are gathered over context.

    kernel: (q, k, v, mask, shard, shards) -> [B, N, L, H], where the queries are the `shard`-th of `shards` parts of
    the row and the mask has the arrays of these queries and of all keys.
    """
    if current_mesh() is None:
        return kernel(q_BNLH, k_BKSH, v_BKSH, _gathered(mask), 0, 1)

    def local(q_BNLH, k_BKSH, v_BKSH, mask):
        gather = functools.partial(jax.lax.all_gather, axis_name="context", tiled=True)
        k_BKSH, v_BKSH = gather(k_BKSH, axis=2), gather(v_BKSH, axis=2)
        keys = lambda own, keys: gather(own if keys is None else keys, axis=1)
        if mask.segment_ids is not None:
            mask = dataclasses.replace(mask, key_segment_ids=keys(mask.segment_ids, mask.key_segment_ids))
        if mask.positions is not None:
            mask = dataclasses.replace(mask, key_positions=keys(mask.positions, mask.key_positions))
        shard, shards = jax.lax.axis_index("context"), jax.lax.axis_size("context")
        return kernel(q_BNLH, k_BKSH, v_BKSH, mask, shard, shards)

    mask = jax.tree.map(lambda x: reshard(x, *TOKENS), mask)
    heads = jax.sharding.PartitionSpec(BATCH, "tensor", "context", None)
    over_mesh = jax.shard_map(local, in_specs=(heads, heads, heads, TOKENS), out_specs=heads, check_vma=False)
    return over_mesh(q_BNLH, k_BKSH, v_BKSH, mask)


def _splash(q_BNLH, k_BKSH, v_BKSH, mask: Mask, shard, shards: int, *, interpret: bool) -> jax.Array:
    """Forward and fused backward kernel. Rows that no block divides are padded here, with keys that nothing sees."""
    _, N, L, H = q_BNLH.shape
    S = k_BKSH.shape[2]
    block_q, block_kv = splash_blocks(L, S, H, q_BNLH.dtype.itemsize)
    more_L, more_S = -L % block_q, -S % block_kv
    ids_BL, ids_BS = mask.segment_ids, mask.key_segment_ids
    if ids_BS is None and more_S:
        ids_BS = jnp.ones((len(q_BNLH), S), jnp.int32)
    pad = lambda x_BxLx, more: jnp.pad(x_BxLx, ((0, 0), (0, 0), (0, more), (0, 0)))
    q_BNLH, k_BKSH, v_BKSH = pad(q_BNLH * H**-0.5, more_L), pad(k_BKSH, more_S), pad(v_BKSH, more_S)
    segments = None
    if ids_BS is not None:  # padding queries see what the last one sees, so that their softmax has something to sum
        ids_BL = jnp.ones((len(q_BNLH), L), jnp.int32) if ids_BL is None else ids_BL
        segments = splash.SegmentIds(
            jnp.pad(ids_BL, ((0, 0), (0, more_L)), mode="edge"), jnp.pad(ids_BS, ((0, 0), (0, more_S)))
        )
    kind = (mask.kind, mask.block, S)
    kernel = _splash_kernel(N, L, L + more_L, S + more_S, block_q, block_kv, kind, shard, shards, interpret)
    over_rows: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))
    return over_rows(q_BNLH, k_BKSH, v_BKSH, segments)[:, :, :L]


class _Computed(splash_attention_mask._ComputableMask):
    """A kind of masks.py, computed in the kernel from the indices of query and key."""

    def __init__(self, shape: tuple[int, int], kind: tuple[str, int, int], shards: int):
        self._key = (shape, kind, shards)
        super().__init__(shape, mask_function=order(*kind), shard_count=shards)

    def __eq__(self, other):
        return isinstance(other, _Computed) and self._key == other._key and (self.q_sequence == other.q_sequence).all()

    def __hash__(self):
        return hash((*self._key, self.q_sequence.tobytes()))


def _splash_kernel(heads, length, queries, keys, block_q, block_kv, kind, shard, shards, interpret):
    """The kernel for `queries` rows of scores by `keys`; of the queries `length` are of the row, the rest padding."""
    full = kind[0] == "full"
    mask = splash.FullMask((queries, keys))
    if not full:  # over context one mask of all shards' queries, of which each device takes its own part
        mask = _Computed((shards * queries, keys), kind, shards)
        mask.q_sequence = (np.arange(shards)[:, None] * length + np.arange(queries)).astype(np.int32).ravel()
    compute = max(c for c in range(128, 513, 128) if block_kv % c == 0)
    # Each block of keys gives a part of the gradient of q, and the parts are added outside of the kernel: the fewer the
    # better. Of a causal mask larger blocks would hold more that nothing sees.
    backward_kv = 2 * block_kv if full and keys % (2 * block_kv) == 0 else block_kv
    blocks = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
        block_q_dkv=block_q, block_kv_dkv=backward_kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=1 if full else shards,
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
    if full or shards == 1:
        return kernel

    def mine(x):  # positions [queries], or tables of blocks [1, queries, keys]
        axis = 0 if x.ndim == 1 else 1
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, shard * size, size, axis)

    return jax.tree.map(mine, kernel)


def splash_blocks(queries: int, keys: int, head_dim: int, itemsize: int) -> tuple[int, int]:
    """Queries and keys of a block of scores; itemsize: bytes of an element.

    1024 x 2048 in bfloat16 for heads of 128 (of which lanes make any smaller one): the largest that fit into the 16 MiB
    of VMEM which every chip gives a kernel without compiler options. 2048 x 2048 would take 3% (v5p) to 5% (v6e) fewer
    instruction bundles, 1024 x 1024 11% more.
    """
    of_key = itemsize * max(head_dim, 128)
    return _block(queries, max(2**18 // of_key, 128)), _block(keys, max(2**19 // of_key, 128))


def _block(length: int, most: int) -> int:
    """The block for a row: a multiple of 128, at most `most`; it divides the length unless only small ones would."""
    count = -(-length // most)
    for n in range(count, 2 * count + 1):
        if length % (128 * n) == 0:
            return length // n
    return -(-length // (128 * count)) * 128


def _cudnn(q_BNLH, k_BKSH, v_BKSH, mask: Mask, shard, shards: int, *, implementation: Any = "cudnn") -> jax.Array:
    """cuDNN's flash attention. Masks other than full and causal ones cost it a bias of [B, 1, L, S]; where the segments
    of each row are all one, it goes without."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BNLH, k_BKSH, v_BKSH))
    L, S = q.shape[1], k.shape[1]
    run: Any = functools.partial(jax.nn.dot_product_attention, q, k, v, implementation=implementation)

    def run_masked(mask: Mask):
        visible_BLS = visible(mask, L, S, shard * L)
        return run() if visible_BLS is None else run(mask=visible_BLS[:, None])

    one = dataclasses.replace(mask, segment_ids=None, key_segment_ids=None)
    is_causal = mask.kind == "causal" and mask.positions is None and shards == 1 and L == S
    unsegmented = functools.partial(run, is_causal=True) if is_causal else functools.partial(run_masked, one)
    ids_BS = mask.key_segment_ids
    if ids_BS is None:
        out = unsegmented()
    else:
        out = jax.lax.cond(jnp.all(ids_BS == ids_BS[:, :1]), unsegmented, lambda: run_masked(mask))
    return jnp.swapaxes(out, 1, 2)
