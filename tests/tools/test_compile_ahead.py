"""What the command refuses, what it says of a program that does not fit, which masks it assumes. Nothing compiles."""

import collections
import re
import types

import numpy as np
import pytest

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.model.attention import splash_blocks
from llada_jax.model.config import model_config
from llada_jax.model.transformer import parameter_count
from llada_jax.parallel.chips import GIB
from llada_jax.tools.ahead import calibration, compile, estimate, search, text
from llada_jax.tools.ahead.slices import parse_topology


def tiny(**train):
    config = run_config("tiny")
    config.data.row_length = 128
    config.train.update(dict(batch_size=64, **train))
    return config


@pytest.mark.parametrize(
    "change, slices, message",
    [
        (lambda c: c.model.update(vocab_size=0), 1, "--config.model.vocab_size=8192"),
        (
            lambda c: c.train.update(batch_size=60),
            1,
            "batch_size 60 does not split into 1 microbatches over 16 devices",
        ),
        (lambda c: c.mesh.update(tensor=3), 1, "does not fit 16 devices"),
        (lambda c: c.mesh.update(fsdp=1, tensor=32), 2, "the devices are in 2 slices or hosts; data x fsdp must be a"),
        (lambda c: c.data.update(row_length=4096), 1, "longer than the model's context"),
        (lambda c: c.mesh.update(tensor=16), 1, "config.mesh.tensor=16 does not divide config.model.n_kv_heads"),
        (
            lambda c: [c.mesh.update(context=16, fsdp=1), c.data.update(row_length=100)],
            1,
            "config.mesh.context=16 does not divide config.data.row_length, which is 100",
        ),
    ],
)
def test_what_can_not_run_is_refused_before_it_is_compiled(change, slices, message):
    config = tiny()
    change(config)
    with pytest.raises(InputError, match=message):
        compile.compile_step(config, parse_topology("v5e-16", slices))


def test_the_compiler_names_what_was_missing():
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (601.56G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert compile._temporaries_of(said) == round(601.56 * GIB)
    with pytest.raises(InputError, match="the compiler refused the step: INTERNAL: Mosaic failed"):
        compile._temporaries_of("INTERNAL: Mosaic failed\nto compile")


def test_the_largest_buffers_of_its_report():
    said = """Memory Space: default (color=0)
Total bytes: 19901961280 (18.53GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    2.00GiB( 14%);    2.00GiB;   2072297472;                6; f32[4096,4096], 2×f32[126464,4096]
    2.48GiB( 28%);  494.00MiB;       180224;               18; f32[126464,1024]
  The rest 317 values are less than 5% of the total size and not shown.
"""
    assert compile._buffers(said) == [
        (2 * GIB, "f32[4096,4096], 2×f32[126464,4096]"),
        (494 * 2**20, "f32[126464,1024]"),
    ]


def on_mesh(config, **sizes):
    shape = dict(data=1, fsdp=1, tensor=1, context=1) | sizes
    model = types.SimpleNamespace(embedding_size=126464)
    return types.SimpleNamespace(config=config, model=model, mesh=types.SimpleNamespace(shape=shape))


@pytest.mark.parametrize("microbatches, devices, rows", [(5, 256, 1), (1, 256, 5), (1, 16, 80)])
@pytest.mark.parametrize("balanced", [False, True])
def test_devices_wait_for_the_one_with_most_masks(microbatches, devices, rows, balanced):
    config = run_config("llada_8b")
    config.train.microbatches, config.objective.balanced = microbatches, balanced
    found = estimate.expected_chunks(on_mesh(config, fsdp=devices))
    by_chance = {1: 1.2, 5: 1.6, 80: 1.1}[rows]  # of one row a microbatch takes each device's smallest first
    most = 1.2 if rows == 1 else 1.06  # of one row's chunks a part more or less is much
    assert 1 < found["slowest"] / found["mean"] < most if balanced else found["slowest"] / found["mean"] > by_chance
    assert found["share"] == pytest.approx(0.5005)


def test_the_control_scores_every_position():
    config = run_config("arm_1b")
    config.objective.name = "autoregressive"
    found = estimate.expected_chunks(on_mesh(config, fsdp=64))
    assert found["mean"] == found["slowest"] and found["share"] == 1.0


@pytest.mark.parametrize("length, shards", [(2048, 1), (4096, 1), (8192, 1), (8192, 4), (1536, 1)])
def test_a_causal_kernel_costs_the_blocks_that_it_executes(length, shards):
    """Those that hold a visible score, counted in the mask itself, for the device with the end of the row."""
    queries = length // shards
    visible = np.tril(np.ones((length, length), bool))[-queries:]
    q, k = splash_blocks(queries, length, 128, itemsize=2)
    blocks = [visible[i : i + q, j : j + k] for i in range(0, queries, q) for j in range(0, length, k)]
    executed = sum(block.size for block in blocks if block.any())
    assert estimate.executed_share(length, shards) == pytest.approx(executed / visible.size)


def test_two_runs_a_chip_are_what_their_names_say():
    count = collections.Counter(parse_topology(run.topology).chip.name for run in calibration.RUNS)
    assert all(count[chip] >= 2 for chip in ("v5e", "v5p", "v6e", "tpu7x"))
    for run in calibration.RUNS:
        config = calibration.config_of(run)
        assert config.train.batch_size == run.rows * parse_topology(run.topology).chips * (
            2 if "7x" in run.topology else 1
        )
        billions = float(re.findall(r"(\d+)B", run.name)[-1])
        assert parameter_count(model_config(config.model)) / 1e9 == pytest.approx(billions, rel=0.04), run


def test_a_published_speed_in_flops_is_one_in_tokens():
    """Both stand in MaxText's log of Llama 2 70B on v6e-256: 402.274 TFLOP/s and 905.021 tokens/s a chip."""
    (run,) = [run for run in calibration.RUNS if run.name == "Llama 2 70B"]
    assert calibration._tokens(402.274, run.shape) == pytest.approx(905.021, rel=1e-3)


@pytest.mark.parametrize(
    "value, words", [(12345, "12,000"), (98.7, "99"), (9.96, "10"), (2.449, "2.4"), (0.0371, "0.037")]
)
def test_an_estimate_has_two_digits(value, words):
    assert text.rough(value) == words


def test_what_a_search_tries():
    config, topology = run_config("llada_8b"), parse_topology("v5p-128")
    plain, tensor, copies, split = search.meshes(config, topology)
    assert (plain["fsdp"], tensor["tensor"], copies["data"], split["context"]) == (-1, 2, 2, 2)
    assert search.microbatch_counts(config, topology, plain) == [1, 2, 4, 5, 10, 20]
    assert search.microbatch_counts(config, topology, tensor) == [1, 2, 4, 5, 8, 10, 20, 40]
    config.mesh.update(plain)
    at_one = search.least_bytes(config, topology)
    config.train.microbatches = 20
    assert search.least_bytes(config, topology) < at_one / 5


FOUND = {
    "topology": "v5e:4x4", "chips": 16, "mesh": {"data": 1, "fsdp": 16}, "batch_size": 16, "row_length": 4096,
    "microbatches": 1, "remat": "full", "parameters": 8_015_581_184, "fits": False, "notes": [],
    "bytes_per_chip": 20 * GIB, "capacity_bytes_per_chip": int(15.75 * GIB), "flags": "--config.model.remat=full",
    "bytes_per_chip_by_class": {"parameters": 2 * GIB, "temporaries": 18 * GIB, "code": 0},
    "largest_buffers": [[2 * GIB, "f32[126464,4096]"]],
}  # fmt: skip


def test_what_does_not_fit_is_said_with_the_largest_buffers():
    said = text.describe(FOUND)
    assert "DOES NOT FIT: 20.00 GiB of 15.75 GiB a chip (parameters 2.00 GiB, temporaries 18.00 GiB)" in said
    assert "  2.00 GiB  f32[126464,4096]" in said
