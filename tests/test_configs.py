"""Every file of configs/ loads, is locked, and describes a model and a schedule that exist."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest

from llada_jax.config import GROUPS, check_config, differences, run_config
from llada_jax.fields import InputError
from llada_jax.model.config import model_config
from llada_jax.objectives import OBJECTIVES
from llada_jax.tools.ahead.slices import parse_topology
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
    assert OBJECTIVES[config.objective.name].causal == config.model.causal
    check_config(config)
    tokens = config.train.batch_size * config.data.row_length
    rate = optimizer.make_schedule(config.optimizer.schedule, total_steps=config.train.steps, tokens_per_step=tokens)
    peak = max(value for _, value, _ in config.optimizer.schedule)
    assert 0 < float(rate(config.train.steps // 2)) <= peak * 1.0001
    assert path.stem in (path.read_text().split('"""')[1]), "the header carries the command"


def test_defaults_are_the_published_recipe():
    config = run_config()
    assert model_config(config.model).d_model == 4096
    assert (config.optimizer.weight_decay, config.train.batch_size, config.objective.eps) == (0.1, 1280, 1e-3)


FIELDS = [(group, field.name) for group, cls in GROUPS.items() for field in dataclasses.fields(cls)]
NEVER = [
    None,
    object(),
    float("nan"),
    float("inf"),
    -float("inf"),
    -7,
    -0.5,
    10**400,
    1e301,
    {},
    b"x",
    1j,
    "\ud800",
    "a\0b",
]


@pytest.mark.parametrize("group, name", FIELDS)
def test_every_field_refuses_what_no_run_can_use(group, name):
    """In one line that names it, for each kind of nonsense; its own default passes."""
    for value in NEVER:
        config = run_config()
        check_config(config)
        values = config.to_dict()
        values[group][name] = value
        with pytest.raises(InputError, match=rf"^config\.{group}\.{name} is .{{1,60}}; it must be "):
            check_config(values)


@pytest.mark.parametrize(
    "field, bad, good",
    [
        ("model.rope_theta", [0, -5.0, 1e13], [1e4]),
        ("model.rms_norm_eps", [0.0, 2], [1e-6]),
        ("optimizer.b1", [1, 1.0, 2], [0, 0.99]),
        ("optimizer.b2", [1.5], [0.0]),
        ("optimizer.clip_norm", [-1], [0, 0.5]),
        ("optimizer.mu_dtype", ["foo", "float16"], ["bfloat16"]),
        ("objective.eps", [0, 2, -1], [1, 1e-4]),
        ("data.random_length_fraction", [2, 1.01], [0, 1]),
        ("data.validation_fraction", [1], [0, 0.5]),
        ("data.vocab_size", [268, 2**31 - 1], [320]),
        ("data.threads", [0, -1, True], [1]),
        ("train.steps", [0, 3_000_000_000, 1.0], [1]),
        ("train.seed", [2**32, True], [2**32 - 1]),
        ("train.eval_rows", [0], [1]),
        ("train.rollback_rate", [0, 1.5], [1, 0.5]),
        ("checkpoint.keep", [0], [1]),
        ("mesh.data", [2**21], [-1, 4]),
    ],
)
def test_ranges_stand_where_they_are_said_to(field, bad, good):
    group, name = field.split(".")
    for value in good:
        values = run_config().to_dict()
        values[group][name] = value
        check_config(values)
    for value in bad:
        values[group][name] = value
        with pytest.raises(InputError, match=f"config.{field} is "):
            check_config(values)


def test_an_unknown_field_names_the_nearest():
    values = run_config().to_dict()
    values["train"]["bach_size"] = 8
    with pytest.raises(InputError, match="config.train.bach_size: no such field; did you mean batch_size"):
        check_config(values)


@pytest.mark.parametrize("name, causal", [("autoregressive", False), ("pretrain", True), ("sft", True)])
def test_a_left_to_right_model_has_a_left_to_right_objective(name, causal):
    config = run_config("tiny")
    config.objective.name, config.model.causal = name, causal
    config.data.row_length, config.train.batch_size = 64, 8
    if name == "sft":
        config.data.kind = "chat"
    with pytest.raises(InputError, match=f"'{name}' needs config.model.causal={not causal}"):
        train.check(config, 1)


def test_a_mesh_axis_that_takes_what_is_left_counts_as_what_it_gets():
    config = run_config("tiny")
    config.data.row_length, config.train.batch_size = 64, 4
    config.mesh.update(dict(data=2, fsdp=2, tensor=-1))
    train.check(config, 8)
    config.mesh.update(dict(data=4, fsdp=2, tensor=-1))
    with pytest.raises(InputError, match="batch_size 4 does not split into 1 microbatches over 8 devices"):
        train.check(config, 8)


def test_differences_name_the_fields():
    old, new = {"a": {"b": 1, "c": (1, 2)}}, {"a": {"b": 2, "c": [1, 2]}, "d": 3}
    assert differences(old, new) == ["config.a.b: 1 -> 2", "config.d: None -> 3"]


SLICED = [(path, name) for path in CONFIGS for name in getattr(module(path), "SLICES", {})]


@pytest.mark.parametrize("path, name", SLICED, ids=lambda x: getattr(x, "stem", x))
def test_settings_of_a_slice_divide_over_it(path, name):
    config = load(path, name)
    count, _, one = name.rpartition("x") if name[0].isdigit() else ("1", "", name)
    devices = 1  # of one GPU
    if name not in ("h200", "rtx-24gb"):
        topology = parse_topology(one, int(count))
        devices = topology.chips * topology.chip.devices
        assert config.mesh.data % topology.count == 0
    train.check(config, devices)
    assert devices % math.prod(size for size in config.mesh.values() if size != -1) == 0
    with pytest.raises(InputError, match="no settings for the slice 'v9-7'; there are some for"):
        load(path, "v9-7")
