"""What goes wrong in tests: batches whose loss is not a number."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.objectives import OBJECTIVES
from llada_jax.streams import stream


@contextlib.contextmanager
def nan_batches(numbers, seed=0):
    """While it is open, the batches with these numbers (from 0) give a run of that seed a loss of NaN."""
    originals, run_key = dict(OBJECTIVES), stream(seed, "train")
    keys = np.stack([jax.random.key_data(jax.random.fold_in(run_key, number)) for number in numbers])

    def spoiled(original):
        def corrupt(batch, key, model, config):
            noisy = original.corrupt(batch, key, model, config)
            hit = jnp.any(jnp.all(jax.random.key_data(key) == keys, axis=-1))
            return dataclasses.replace(noisy, weights=jnp.where(hit, jnp.nan, noisy.weights))

        return dataclasses.replace(original, corrupt=corrupt)

    OBJECTIVES.update({name: spoiled(objective) for name, objective in originals.items()})
    try:
        yield
    finally:
        OBJECTIVES.update(originals)
