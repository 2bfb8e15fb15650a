"""Every file of configs/ loads, is locked, and describes a model and a schedule that exist."""

import importlib.util
import math
from pathlib import Path

import pytest

from llada_jax.config import differences, run_config
from llada_jax.inputs import InputError
from llada_jax.model.config import model_config
from llada_jax.objectives.elbo import objective_named
from llada_jax.tools.ahead.chips import parse_topology
from llada_jax.training import optimizer
from llada_jax.training import run as train

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("[a-z]*.py"))


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def load(path, *args):
    return module(path).get_config(*args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_whole(path):
    config = load(path)
    assert config.is_locked
    with pytest.raises((KeyError, AttributeError)):
        config.train.stepz = 1
    groups = dict(config.model)
    if not groups["vocab_size"]:  # the tokenizer's
        groups["vocab_size"] = groups["embedding_size"] = 512
    assert model_config(groups).max_sequence_length >= config.data.row_length
    objective_named(config.objective.name)
    tokens = config.train.batch_size * config.data.row_length
    rate = optimizer.make_schedule(config.optimizer.schedule, total_steps=config.train.steps, tokens_per_step=tokens)
    peak = max(value for _, value, _ in config.optimizer.schedule)
    assert 0 < float(rate(config.train.steps // 2)) <= peak * 1.0001
    assert path.stem in (path.read_text().split('"""')[1]), "the header carries the command"


def test_defaults_are_the_published_recipe():
    config = run_config()
    assert model_config(config.model).d_model == 4096
    assert (config.optimizer.weight_decay, config.train.batch_size, config.objective.eps) == (0.1, 1280, 1e-3)


def test_differences_name_the_fields():
    old, new = {"a": {"b": 1, "c": (1, 2)}}, {"a": {"b": 2, "c": [1, 2]}, "d": 3}
    assert differences(old, new) == ["config.a.b: 1 -> 2", "config.d: None -> 3"]


SLICED = [(path, name) for path in CONFIGS for name in getattr(module(path), "SLICES", {})]


@pytest.mark.parametrize("path, name", SLICED, ids=lambda x: getattr(x, "stem", x))
def test_settings_of_a_slice_divide_over_it(path, name):
    config = load(path, name)
    count, _, one = name.rpartition("x") if name[0].isdigit() else ("1", "", name)
    topology = parse_topology(one, int(count))
    train.check(config, topology.chips * topology.chip.devices)
    sizes = [size for size in config.mesh.values() if size != -1]
    assert topology.chips * topology.chip.devices % math.prod(sizes) == 0
    assert config.mesh.data % topology.count == 0
    with pytest.raises(InputError, match="no settings for the slice 'v9-7'; there are some for"):
        load(path, "v9-7")
