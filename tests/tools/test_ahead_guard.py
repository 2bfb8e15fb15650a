"""The 8B step compiled for three TPUs, two layers of it: what the compiler says must stay what was recorded.

A change that costs memory, traffic or cycles fails here, before a TPU is rented. If it is meant, or the compiler is a
new one, record again and look at the difference:

    python tests/tools/test_ahead_guard.py
"""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from llada_jax.config import run_config
from llada_jax.tools.ahead.compile import compile_step
from llada_jax.tools.ahead.estimate import report
from llada_jax.tools.ahead.slices import parse_topology

RECORDED = Path(__file__).parents[1] / "golden" / "compile_ahead.json"
SLICES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
TOLERANCE = 0.03  # of bytes and cycles; counts are exact
QUICK = {"xla_tpu_scoped_vmem_limit_kib": 16384}  # to compile: with 96 MiB a v6e takes six minutes, not one
OF_ANOTHER_COMPILER = 0.3  # than the recorded one: gross regressions only, and counts are not compared


def two_layers():
    """Published widths and recipe, two layers, one row a chip."""
    config = run_config("llada_8b")
    config.model.n_layers, config.model.residual, config.model.remat = 2, "compute", "attention"
    config.data.row_length = 1024  # compiles in half the time of 4096
    config.train.batch_size = 16
    return config


def measure(name: str) -> dict:
    found = report(compile_step(two_layers(), parse_topology(name), options=QUICK))
    kinds = {f"{c['kind']} {c['axes']}": {"count": c["count"], "bytes": c["bytes"]} for c in found["transfers"]}
    return {
        "fits": found["fits"],
        "bytes_per_chip": found["bytes_per_chip"],
        "estimated_cycles": found["estimated_cycles"],
        "scattered_share": scattered_share(found),
        "waited_share": waited_share(found),
        "collectives": dict(sorted(kinds.items())),
    }


def scattered_share(found: dict) -> float:
    """Of the bytes that are summed over devices, gradients almost all: those of which each device gets its part alone.

    The others are summed in full on every device, which takes the links twice as long.
    """
    summed = {kind: sum(c["bytes"] for c in found["transfers"] if c["kind"] == kind) for kind in
              ("reduce-scatter", "all-reduce")}  # fmt: skip
    return summed["reduce-scatter"] / sum(summed.values())


def waited_share(found: dict) -> float:
    """Of the time that sums over devices take, that in which nothing else is computed."""
    taken = sum(c["seconds"] for c in found["transfers"] if c["kind"] == "all-reduce")
    return found["parts"]["exposed_by_kind"]["all-reduce"] / taken


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_the_compiled_step_is_the_recorded_one(name):
    golden = json.loads(RECORDED.read_text())
    recorded, found = golden["slices"][name], measure(name)
    same = golden["versions"] == versions()
    tolerance = TOLERANCE if same else OF_ANOTHER_COMPILER
    count = lambda measured: {kind: c["count"] for kind, c in measured["collectives"].items()}
    size = lambda measured: sum(c["bytes"] for c in measured["collectives"].values())
    assert found["fits"]
    if same:
        assert count(found) == count(recorded)
    for field in ("scattered_share", "waited_share"):
        assert found[field] == pytest.approx(recorded[field], abs=TOLERANCE), field
    assert size(found) == pytest.approx(size(recorded), rel=tolerance)
    for field in ("bytes_per_chip", "estimated_cycles"):
        assert found[field] == pytest.approx(recorded[field], rel=tolerance), field


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    slices = {name: measure(name) for name in SLICES}
    RECORDED.write_text(json.dumps({"versions": versions(), "slices": slices}, indent=1) + "\n")
