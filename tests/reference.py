"""The vectors of tests/golden/reference: numbers that the official PyTorch code produced."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from llada_jax.checkpoint import abstract_model, named_leaves
from llada_jax.interop import hf, names

REFERENCE = Path(__file__).parent / "golden" / "reference"


@functools.cache
def vectors(kind):
    """{case: {array name: array}} and the json of the cases."""
    cases: dict = {}
    for name, array in load_file(REFERENCE / f"{kind}.safetensors").items():
        case, _, rest = name.partition("/")
        cases.setdefault(case, {})[rest] = array
    return cases, json.loads((REFERENCE / f"{kind}.json").read_text())["cases"]


@functools.cache
def load(checkpoint, compute=None):
    """The model of a reference checkpoint, float32; `compute` in another dtype is what autocast does."""
    model = hf.load(REFERENCE / checkpoint)
    return model if compute is None else with_compute(model, compute)


def with_compute(model, dtype):
    like = abstract_model(dataclasses.replace(model.config, dtype=dtype), None)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def published(model):
    """{published name: array} of a model, or of gradients in its shape."""
    leaves = dict(named_leaves(model))
    pick = lambda t: leaves[t.parameter] if t.layer is None else leaves[t.parameter][t.layer]
    return {t.name: np.asarray(pick(t)).reshape(t.shape) for t in names.tensors(model.config)}
