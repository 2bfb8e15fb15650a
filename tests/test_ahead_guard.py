"""The 8B step on three TPUs, two layers of it: what the compiler says must stay what was recorded.

A change that costs memory, traffic or cycles fails here before a TPU is rented. If it is meant, or the compiler is a new
one, record again and look at the difference:

    python tests/test_ahead_guard.py
"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for recording

from llada_jax.ahead.chips import parse_topology
from llada_jax.ahead.compile import compile_step
from llada_jax.ahead.estimate import report
from llada_jax.config import run_config

RECORDED = Path(__file__).parent / "golden" / "compile_ahead.json"
SLICES = ("v5e:4x4", "v5p:2x2x4", "v6e:4x4")
TOLERANCE = 0.03  # of bytes and cycles; counts are exact


def small_run():
    """Published widths, two layers, the 8B recipe; one row a chip."""
    config = run_config("llada_8b")
    config.model.n_layers = 2
    config.data.row_length = 4096
    config.train.batch_size = 16
    return config


def measure(name: str) -> dict:
    found = report(compile_step(small_run(), parse_topology(name)))
    kinds = {f"{c['kind']} {c['axes']}": {"count": c["count"], "bytes": c["bytes"]} for c in found["collectives"]}
    return {
        "bytes_per_chip": found["bytes_per_chip"],
        "estimated_cycles": found["estimated_cycles"],
        "attention_seconds": found["parts"]["attention_seconds"],
        "collectives": dict(sorted(kinds.items())),
        "fits": found["fits"],
    }


@pytest.mark.parametrize("name", SLICES)
def test_the_compiled_step_is_the_recorded_one(name):
    pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'tpu'")
    recorded, found = json.loads(RECORDED.read_text())["slices"][name], measure(name)
    assert found["fits"]
    assert {k: v["count"] for k, v in found["collectives"].items()} == {
        k: v["count"] for k, v in recorded["collectives"].items()
    }
    for kind, expected in recorded["collectives"].items():
        assert found["collectives"][kind]["bytes"] == pytest.approx(expected["bytes"], rel=TOLERANCE), kind
    for field in ("bytes_per_chip", "estimated_cycles", "attention_seconds"):
        assert found[field] == pytest.approx(recorded[field], rel=TOLERANCE), field


def record() -> None:
    import jax
    import libtpu

    versions = {"jax": jax.__version__, "libtpu": libtpu.__version__}
    slices = {name: measure(name) for name in SLICES}
    RECORDED.write_text(json.dumps({"versions": versions, "slices": slices}, indent=1) + "\n")


if __name__ == "__main__":
    record()
