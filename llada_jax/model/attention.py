"""Attention for every mask kind, by the kernel of the platform.

Kinds: full (no segment ids), segments (one id a document), padding (id 0), and each of them causal.
Kernels: "splash" on TPUs (Pallas, in JAX), "cudnn" on GPUs, "xla" anywhere; only the last makes the L×S scores.
B batch, L length (queries), S length (keys), N query heads, K key heads, G query heads a key head, H head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llada_jax.fields import InputError
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
    segment_ids_BL: jax.Array | None,
    causal: bool,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention, [B, N, L, H] in the dtype of q.

    Without segment ids every position sees the whole row. With them a query sees the keys of its own segment; segment
    0 is padding, which nothing else sees. `causal` hides later positions besides. Scores and softmax are float32.
    Outputs in padding are finite and of no use: "xla" and "cudnn" let such queries see all that is not padding, as in
    the official code, "splash" lets them see padding. Raises InputError for a kernel that can't serve here.
    """
    kernel = kernel_for(kernel, platform(), q_BNLH.dtype.name)
    if kernel == "xla":
        return checkpoint_name(_xla(q_BNLH, k_BKSH, v_BKSH, segment_ids_BL, causal), "attention")
    if kernel == "cudnn":
        return checkpoint_name(_per_device(_cudnn, q_BNLH, k_BKSH, v_BKSH, segment_ids_BL, causal), "attention")
    one_device = functools.partial(_splash, interpret=kernel == "splash_interpret")
    return _per_device(one_device, q_BNLH, k_BKSH, v_BKSH, segment_ids_BL, causal)


def _xla(q_BNLH, k_BKSH, v_BKSH, segment_ids_BL, causal: bool) -> jax.Array:
    """The plain reference; over a mesh the compiler divides it."""
    k_BKSH, v_BKSH = (reshard(x, BATCH, "tensor", None, None) for x in (k_BKSH, v_BKSH))  # context: gather
    B, N, L, H = q_BNLH.shape
    K = k_BKSH.shape[1]
    grouped = spec(BATCH, "tensor", None, "context", None)
    q_BKGLH = jnp.reshape(q_BNLH, (B, K, N // K, L, H), out_sharding=grouped)
    scores = jnp.einsum("BKGLH,BKSH->BKGLS", q_BKGLH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    ids_BS = None if segment_ids_BL is None else reshard(segment_ids_BL, BATCH, None)
    visible_BLS = _visible(segment_ids_BL, ids_BS, jnp.arange(L) if causal else None, L)
    if visible_BLS is not None:
        scores = jnp.where(visible_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    out = jnp.einsum("BKGLS,BKSH->BKGLH", weights, v_BKSH, out_sharding=grouped)
    return jnp.reshape(out, (B, N, L, H), out_sharding=spec(BATCH, "tensor", "context", None))


def _visible(ids_BL, ids_BS, positions_L, keys: int) -> jax.Array | None:
    """Which key each query sees, [B or 1, L, S]; None: all. Positions are given when causal."""
    visible = None
    if ids_BL is not None:
        query, key = ids_BL[:, :, None], ids_BS[:, None, :]
        visible = ((query == key) | (query == 0)) & (key > 0)
    if positions_L is not None:
        earlier = positions_L[None, :, None] >= jnp.arange(keys)
        visible = earlier if visible is None else visible & earlier
    return visible


def _per_device(kernel, q_BNLH, k_BKSH, v_BKSH, segment_ids_BL, causal: bool) -> jax.Array:
    """`kernel` on each device's rows, heads and queries. Keys and values of the row are gathered over context.

    kernel: (q, k, v, ids of the queries, ids of the keys, causal, shard, shards) -> [B, N, L, H], where the queries are
    the `shard`-th of `shards` parts of the row.
    """
    if current_mesh() is None:
        return kernel(q_BNLH, k_BKSH, v_BKSH, segment_ids_BL, segment_ids_BL, causal, 0, 1)

    def local(q_BNLH, k_BKSH, v_BKSH, ids_BL):
        gather = functools.partial(jax.lax.all_gather, axis_name="context", tiled=True)
        k_BKSH, v_BKSH = gather(k_BKSH, axis=2), gather(v_BKSH, axis=2)
        ids_BS = None if ids_BL is None else gather(ids_BL, axis=1)
        shard, shards = jax.lax.axis_index("context"), jax.lax.axis_size("context")
        return kernel(q_BNLH, k_BKSH, v_BKSH, ids_BL, ids_BS, causal, shard, shards)

    if segment_ids_BL is not None:
        segment_ids_BL = reshard(segment_ids_BL, *TOKENS)
    heads = jax.sharding.PartitionSpec(BATCH, "tensor", "context", None)
    over_mesh = jax.shard_map(local, in_specs=(heads, heads, heads, TOKENS), out_specs=heads, check_vma=False)
    return over_mesh(q_BNLH, k_BKSH, v_BKSH, segment_ids_BL)


def _splash(q_BNLH, k_BKSH, v_BKSH, ids_BL, ids_BS, causal: bool, shard, shards: int, *, interpret: bool) -> jax.Array:
    """Forward and fused backward kernel. Rows that no block divides are padded here, with keys that nothing sees."""
    _, N, L, H = q_BNLH.shape
    S = k_BKSH.shape[2]
    # 1024 x 2048 in bfloat16: the largest that fit into the 16 MiB of VMEM which every chip gives a kernel without
    # compiler options. 2048 x 2048 would take 3% (v5p) to 5% (v6e) fewer instruction bundles, 1024 x 1024 11% more.
    block_q, block_kv = _block(L, 2048 // q_BNLH.dtype.itemsize), _block(S, 4096 // q_BNLH.dtype.itemsize)
    more_L, more_S = -L % block_q, -S % block_kv
    if ids_BS is None and more_S:
        ids_BL, ids_BS = jnp.ones((len(q_BNLH), L), jnp.int32), jnp.ones((len(q_BNLH), S), jnp.int32)
    pad = lambda x_BxLx, more: jnp.pad(x_BxLx, ((0, 0), (0, 0), (0, more), (0, 0)))
    q_BNLH, k_BKSH, v_BKSH = pad(q_BNLH * H**-0.5, more_L), pad(k_BKSH, more_S), pad(v_BKSH, more_S)
    segments = None
    if ids_BS is not None:  # padding queries see what the last one sees, so that their softmax has something to sum
        segments = splash.SegmentIds(
            jnp.pad(ids_BL, ((0, 0), (0, more_L)), mode="edge"), jnp.pad(ids_BS, ((0, 0), (0, more_S)))
        )
    kernel = _splash_kernel(N, L, L + more_L, S + more_S, block_q, block_kv, causal, shard, shards, interpret)
    over_rows: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0))
    return over_rows(q_BNLH, k_BKSH, v_BKSH, segments)[:, :, :L]


def _splash_kernel(heads, length, queries, keys, block_q, block_kv, causal, shard, shards, interpret):
    """The kernel for `queries` rows of scores by `keys`; of the queries `length` are of the row, the rest padding."""
    mask = splash.FullMask((queries, keys))
    if causal:  # over context one mask of all shards' queries, of which each device takes its own part
        mask = splash.CausalMask((shards * queries, keys), shard_count=shards)
        mask.q_sequence = (np.arange(shards)[:, None] * length + np.arange(queries)).astype(np.int32).ravel()
    compute = max(c for c in range(128, 513, 128) if block_kv % c == 0)
    blocks = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=blocks, head_shards=1, q_seq_shards=shards if causal else 1,
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
    if not causal or shards == 1:
        return kernel

    def mine(x):  # positions [queries], or tables of blocks [1, queries, keys]
        axis = 0 if x.ndim == 1 else 1
        size = x.shape[axis] // shards
        return jax.lax.dynamic_slice_in_dim(x, shard * size, size, axis)

    return jax.tree.map(mine, kernel)


def _block(length: int, most: int) -> int:
    """The block for a row: a multiple of 128, at most `most`; it divides the length unless only small ones would."""
    count = -(-length // most)
    for n in range(count, 2 * count + 1):
        if length % (128 * n) == 0:
            return length // n
    return -(-length // (128 * count)) * 128


def _cudnn(
    q_BNLH, k_BKSH, v_BKSH, ids_BL, ids_BS, causal: bool, shard, shards: int, *, implementation: Any = "cudnn"
) -> jax.Array:
    """cuDNN's flash attention. Segments cost it a bias of [B, 1, L, S]; where each row is all one, it goes without."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BNLH, k_BKSH, v_BKSH))
    L, S = q.shape[1], k.shape[1]
    run: Any = functools.partial(jax.nn.dot_product_attention, q, k, v, implementation=implementation)
    positions_L = shard * L + jnp.arange(L) if causal else None

    def masked(ids_BL, ids_BS):
        visible_BLS: Any = _visible(ids_BL, ids_BS, positions_L, S)
        return run(mask=visible_BLS[:, None])

    def unmasked():
        return masked(None, None) if causal and shards > 1 else run(is_causal=causal)

    if ids_BS is None:
        out = unmasked()
    else:
        out = jax.lax.cond(jnp.all(ids_BS == ids_BS[:, :1]), unmasked, lambda: masked(ids_BL, ids_BS))
    return jnp.swapaxes(out, 1, 2)
