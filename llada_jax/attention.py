"""Attention for every mask kind.

B batch, L length (queries), S length (keys), N query heads, K key heads, G query heads a key head, H head size.
"""

import jax
import jax.numpy as jnp

from llada_jax.config import InputError
from llada_jax.sharding import BATCH, reshard, spec

# The first of each platform is what "auto" takes; the others serve it, too, when asked for by name.
_KERNELS = {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla"), "cpu": ("xla",)}


def kernel_for(name: str, platform: str) -> str:
    """The kernel that `config.model.attention_kernel` means on "cpu", "gpu" or "tpu"; logs name it.

    Raises InputError when the one asked for can't serve there.
    """
    served = _KERNELS.get(platform, ("xla",))
    if name == "auto":
        return served[0]
    if name not in served:
        raise InputError(
            f"config.model.attention_kernel {name!r} can't serve on {platform}; there: {', '.join(served)}"
        )
    return name


def attention(
    q_BNLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, segment_ids_BL: jax.Array | None, causal: bool
) -> jax.Array:
    """Softmax attention, [B, N, L, H] in the dtype of q.

    Without segment ids every position sees the whole row. With them a query sees the keys of its own segment; segment
    0 is padding, which nothing sees. Queries in padding see all that is not padding, as in the official code, so that
    their outputs are finite. `causal` hides later positions besides. Scores and softmax are float32.
    """
    k_BKSH, v_BKSH = (reshard(x, BATCH, "tensor", None, None) for x in (k_BKSH, v_BKSH))  # context: gather
    B, N, L, H = q_BNLH.shape
    K = k_BKSH.shape[1]
    grouped = spec(BATCH, "tensor", None, "context", None)
    q_BKGLH = jnp.reshape(q_BNLH, (B, K, N // K, L, H), out_sharding=grouped)
    scores = jnp.einsum("BKGLH,BKSH->BKGLS", q_BKGLH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    visible = _visible(segment_ids_BL, causal, L)
    if visible is not None:
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype)
    out = jnp.einsum("BKGLS,BKSH->BKGLH", weights, v_BKSH, out_sharding=grouped)
    return jnp.reshape(out, (B, N, L, H), out_sharding=spec(BATCH, "tensor", "context", None))


def _visible(segment_ids_BL: jax.Array | None, causal: bool, length: int) -> jax.Array | None:
    """Which key each query sees, broadcast to [B, 1, 1, L, S]; None: all."""
    visible = None
    if segment_ids_BL is not None:
        query = segment_ids_BL[:, None, None, :, None]
        key = reshard(segment_ids_BL, BATCH, None)[:, None, None, None, :]
        visible = ((query == key) | (query == 0)) & (key > 0)
    if causal:
        earlier = jnp.arange(length)[:, None] >= jnp.arange(length)
        visible = earlier if visible is None else visible & earlier
    return visible
