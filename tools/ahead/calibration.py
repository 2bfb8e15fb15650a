"""The estimate held against published runs: our own model compiled at their shapes, rows and slices.

All of them are MaxText's. Sources and commits: AI-Hypercomputer/maxtext e591f30c (2026-08-22) and
AI-Hypercomputer/tpu-recipes c8cfe2f6 (2026-08-07).
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from llada_jax.config import RunConfig, run_config
from llada_jax.tools.ahead.compile import compile_step
from llada_jax.tools.ahead.estimate import report
from llada_jax.tools.ahead.slices import parse_topology
from llada_jax.tools.ahead.text import rough

_V5E = "maxtext src/maxtext/configs/tpu/v5e"
_V5P = "maxtext src/maxtext/configs/tpu/v5p"
_V6E = "tpu-recipes training/trillium"
_7X = "tpu-recipes training/ironwood"
_LLAMA: dict[str, Any] = dict(n_kv_heads=8, vocab_size=128256, row_length=8192)
_8B: dict[str, Any] = _LLAMA | dict(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=14336)
_70B: dict[str, Any] = _LLAMA | dict(d_model=8192, n_layers=80, n_heads=64, mlp_hidden_size=28672)
_32B: dict[str, Any] = dict(
    d_model=8192, n_layers=32, n_heads=64, n_kv_heads=64, mlp_hidden_size=28672, vocab_size=32000, row_length=2048
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A causal language model that somebody trained and timed."""

    name: str
    source: str
    topology: str
    measured: float  # tokens/s a chip
    rows: int  # a device, of one step
    shape: dict[str, Any]  # fields of config.model, and row_length
    remat: str  # the nearest to theirs
    tensor: int = 1
    mu_dtype: str = "float32"
    microbatches: int = 1  # more where theirs fits because the host holds what the backward pass needs


def _tokens(tflops: float, shape: dict[str, Any]) -> float:
    """Tokens/s of a source that gives TFLOP/s: MaxText's count of then, attention in full."""
    D, F = shape["d_model"], shape["mlp_hidden_size"]
    attention = 2 * D * D * (1 + shape["n_kv_heads"] / shape["n_heads"])
    weights = shape["n_layers"] * (attention + 3 * D * F) + D * shape["vocab_size"]
    return tflops * 1e12 / (6 * weights + 12 * shape["n_layers"] * shape["row_length"] * D)


_64B = _32B | dict(n_layers=64)
_MISTRAL = _8B | dict(vocab_size=32000)
_LLAMA2_70B = _70B | dict(vocab_size=32000, row_length=4096)
RUNS = (
    Run("32B", f"{_V5E}/README.md, 32b.sh: 132 TFLOP/s", "v5e:16x16", _tokens(132, _32B), 4, _32B, "full"),
    Run("64B", f"{_V5E}/README.md, 64b.sh: 118 TFLOP/s", "v5e:16x16", _tokens(118, _64B), 2, _64B, "full"),
    Run("32B", f"{_V5P}/README.md, 32b.sh: 328 TFLOP/s", "v5p:4x4x4", _tokens(328, _32B), 6, _32B, "matmuls"),
    Run("Llama 2 70B", "maxtext docs/reference/models/tiering.md", "v5p:8x8x8", 692, 4, _LLAMA2_70B, "projections"),
    Run("Llama 3.1 8B", f"{_V6E}/Llama3.1-8B-MaxText/v6e-16", "v6e:4x4", 7243, 3, _8B, "attention"),
    Run("Mistral 7B", f"{_V6E}/Mistral-7B-MaxText", "v6e:2x4", 7777, 6, _MISTRAL, "full", microbatches=2),
    Run("Llama 3.1 70B", f"{_7X}/README.md", "tpu7x:4x4x4", 2687, 2, _70B, "attention", mu_dtype="bfloat16"),
    Run("Llama 3.1 70B", f"{_7X}/README.md", "tpu7x:4x8x8", 2671, 2, _70B, "attention", mu_dtype="bfloat16"),
)


def config_of(run: Run) -> RunConfig:
    """The run as a config of ours: the autoregressive control at that shape."""
    config, topology = run_config("arm_7b"), parse_topology(run.topology)
    ids = dict.fromkeys(("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "eot_token_id"), 0)
    model = {name: value for name, value in run.shape.items() if name != "row_length"}
    config.model.update(
        **model, **ids, embedding_size=model["vocab_size"], max_sequence_length=run.shape["row_length"],
        residual="compute", remat=run.remat,
    )  # fmt: skip
    config.data.row_length, config.data.random_length_fraction = run.shape["row_length"], 0.0
    config.objective.name, config.objective.attention = "autoregressive", "full"
    config.optimizer.mu_dtype, config.mesh.tensor = run.mu_dtype, run.tensor
    config.train.batch_size = run.rows * topology.chips * topology.chip.devices
    config.train.microbatches = run.microbatches
    return config


def calibrate(chips: Collection[str]) -> Iterator[str]:
    """The lines of a table, in Markdown, of the runs on these chips. Each takes minutes."""
    yield "| slice | model, rows x length a device, remat | measured, tokens/s a chip | estimated | ratio | source |"
    yield "|---" * 6 + "|"
    for run in RUNS:
        topology = parse_topology(run.topology)
        if topology.chip.name not in chips:
            continue
        found = report(compile_step(config_of(run), topology))
        estimated = found.get("tokens_per_second_per_chip", 0.0)
        result = f"{rough(estimated)} | {estimated / run.measured:.2f}" if found["fits"] else "does not fit |"
        rows = f"{run.rows}" if run.microbatches == 1 else f"{run.microbatches} times {run.rows // run.microbatches}"
        job = f"{run.name}, {rows} x {run.shape['row_length']}, {run.remat}"
        yield f"| `{run.topology}` | {job} | {run.measured:,.0f} | {result} | {run.source} |"
