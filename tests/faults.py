"""What goes wrong in tests: batches whose loss is not a number."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.streams import stream
from llada_jax.training import run as train


@contextlib.contextmanager
def nan_batches(numbers, seed=0):
    """While it is open, the batches with these numbers (from 0) give a run of that seed a loss of NaN."""
    original = train.objective_named
    run_key = stream(seed, "train")
    keys = np.stack([jax.random.key_data(jax.random.fold_in(run_key, number)) for number in numbers])

    def named(name):
        def objective(batch, key, model, config):
            noisy = original(name)(batch, key, model, config)
            hit = jnp.any(jnp.all(jax.random.key_data(key) == keys, axis=-1))
            return dataclasses.replace(noisy, weights=jnp.where(hit, jnp.nan, noisy.weights))

        return objective

    train.objective_named = named
    try:
        yield
    finally:
        train.objective_named = original
