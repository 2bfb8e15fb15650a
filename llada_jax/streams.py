"""Named random streams: every use of the run's seed draws from a key that no other use can reach."""

import zlib

import jax

STREAMS = ("init", "train", "eval", "sample")


def stream(seed: int, name: str) -> jax.Array:
    """The key of one of STREAMS for a seed from 0 to 2^32 - 1.

    The key of the seed itself is used for nothing else. Names are folded in by their CRC-32, which is far above the
    small counters of `jax.random.split` and of steps: with these a threefry key is the hash of (parent, counter), so
    that `fold_in(key, 1)` and `split(key, 3)[1]` are one and the same key.
    """
    assert name in STREAMS, name
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
