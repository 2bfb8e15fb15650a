"""No two draws of a run share a key."""

import jax
import numpy as np

from llada_jax.model.transformer import Transformer
from llada_jax.streams import STREAMS, stream


def data(keys):
    return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()]


def keys_of_a_run(seed: int, layers: int = 64, steps: int = 500):
    """The keys that a run draws with, as the model, the step, validation and the sampler derive them."""
    top = jax.random.split(stream(seed, "init"), 3)
    blocks = jax.random.split(top[1], layers)
    yield from (top[0], top[2], jax.vmap(lambda key: jax.random.split(key, 7))(blocks))
    for name in ("train", "eval", "sample"):
        each = jax.vmap(lambda i, name=name: jax.random.fold_in(stream(seed, name), i))(np.arange(steps))
        yield from (each, jax.vmap(jax.random.split)(each))


def test_no_two_keys_of_a_run_coincide():
    keys = [key for seed in (0, 1) for part in keys_of_a_run(seed) for key in data(part)]
    keys += [key for seed in (0, 1) for key in data(jax.random.key(seed))]
    keys += [key for seed in (0, 1) for name in STREAMS for key in data(stream(seed, name))]
    assert len(set(keys)) == len(keys)


def test_the_masks_of_a_batch_are_not_the_first_weights(tiny):
    """They were: the mask key of batch n was the initialisation key of layer n."""
    weights = np.asarray(Transformer(tiny, stream(0, "init")).blocks.k_proj[...])
    for n in range(tiny.n_layers):
        mask_key = jax.random.split(jax.random.fold_in(stream(0, "train"), n))[1]
        draws = np.asarray(jax.random.uniform(mask_key, weights[n].shape)).ravel()
        assert abs(np.corrcoef(np.argsort(np.argsort(draws)), np.argsort(np.argsort(weights[n].ravel())))[0, 1]) < 0.2
