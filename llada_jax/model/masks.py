"""Attention masks as arguments: what each kind lets a query see.

B batch, L queries, S keys. A row of text has positions 0..L-1 unless they are given.
"""

import dataclasses

import jax
import jax.numpy as jnp

KINDS = ("full", "causal", "block_causal", "noisy_and_clean")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees.

    kind: "full", all of them. "causal", those at its position and before. "block_causal", those of its block of
        `block` positions and of earlier ones. "noisy_and_clean", for rows that hold two copies of a text, the noisy one
        in the first half and the clean one in the second, both at positions 0..L/2-1: a noisy query sees its own noisy
        block and the clean blocks before it, a clean one the clean blocks up to its own (BD3-LM, arXiv 2503.09573).
    segment_ids: documents of a row, counted from 1; a query sees its own only. 0 is padding, which nothing sees; what a
        padding query returns is finite and of no use. None: one document without padding.
    key_segment_ids, key_positions: those of the keys where they are not the queries' own.
    positions: where blocks and order do not count from the row's start, such as restarting in each document.
    """

    kind: str = dataclasses.field(default="full", metadata=dict(static=True))
    segment_ids: jax.Array | None = None  # int32 [B, L]
    positions: jax.Array | None = None  # int32 [B, L]
    key_segment_ids: jax.Array | None = None  # int32 [B, S]
    key_positions: jax.Array | None = None  # int32 [B, S]
    block: int = dataclasses.field(default=0, metadata=dict(static=True))

    def __post_init__(self):
        assert self.kind in KINDS, self.kind
        assert self.block > 0 or self.kind in ("full", "causal"), "a mask of blocks needs their length"

    @property
    def sees_all(self) -> bool:
        return self.kind == "full" and self.segment_ids is None and self.key_segment_ids is None


FULL = Mask()


def visible(mask: Mask, L: int, S: int, first: int | jax.Array = 0) -> jax.Array | None:
    """Whether each query sees each key, bool [B or 1, L, S]; None: all see all.

    first: index of the first query in the row that the keys make up, where L queries are a part of it.
    """
    seen = None
    key_ids_BS = mask.segment_ids if mask.key_segment_ids is None else mask.key_segment_ids
    if key_ids_BS is not None:
        key = key_ids_BS[:, None, :]
        query = jnp.ones((1, L, 1), jnp.int32) if mask.segment_ids is None else mask.segment_ids[:, :, None]
        seen = ((query == key) | (query == 0)) & (key > 0)
    if mask.kind == "full":
        return seen
    q, k = (first + jnp.arange(L))[None, :, None], jnp.arange(S)[None, None, :]
    allowed = order(mask.kind, mask.block, S)(q, k, *_positions(mask))
    return allowed if seen is None else seen & allowed


def order(kind: str, block: int, S: int):
    """What a kind allows, as a function of the indices of query and key in a row of S, and of their positions.

    Plain arithmetic on integers that broadcast, so that a kernel can compute it for a tile.
    """

    def allowed(q, k, q_position=None, k_position=None):
        half = S // 2
        q_clean, k_clean = q >= half, k >= half
        if kind == "noisy_and_clean":
            q, k = q - half * q_clean, k - half * k_clean
        q = q if q_position is None else q_position
        k = k if k_position is None else k_position
        if kind == "causal":
            return q >= k
        q, k = q // block, k // block
        if kind == "block_causal":
            return q >= k
        return (k_clean & ((q > k) | (q_clean & (q == k)))) | (~q_clean & ~k_clean & (q == k))

    return allowed


def _positions(mask: Mask) -> tuple[jax.Array | None, jax.Array | None]:
    q = mask.positions
    k = q if mask.key_positions is None else mask.key_positions
    return None if q is None else q[:, :, None], None if k is None else k[:, None, :]
