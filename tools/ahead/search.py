"""Tries settings of a run on a slice and ranks those that fit by their estimated speed.

For each mesh and each rule of what the backward pass recomputes, the fewest microbatches that fit: more rows at once
spread the same gathers over more work. The global batch stays what the config says.
"""

from collections.abc import Callable, Iterator
from typing import Any

from llada_jax.config import RunConfig
from llada_jax.fields import InputError
from llada_jax.model.config import REMAT, model_config
from llada_jax.tools.ahead.compile import compile_step
from llada_jax.tools.ahead.estimate import report
from llada_jax.tools.ahead.slices import Slice
from llada_jax.tools.ahead.text import rough


def search(config: RunConfig, topology: Slice, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The reports of what fits, fastest first, each with the flags that set it as "flags". `say` tells of each try."""
    found = []
    for mesh in meshes(config, topology):
        for remat in REMAT:
            for microbatches in microbatch_counts(config, topology, mesh):
                trial = config.copy_and_resolve_references().unlock()
                trial.mesh.update(mesh)
                trial.model.remat, trial.train.microbatches = remat, microbatches
                flags = flags_of(trial)
                if least_bytes(trial, topology) > topology.chip.memory:
                    say(f"{flags}: can't fit")
                    continue
                try:
                    result = report(compile_step(trial, topology))
                except InputError as error:
                    say(f"{flags}: {error}")
                    continue
                say(f"{flags}: {_line(result)}")
                if result["fits"]:
                    found.append({"flags": flags, **result})
                    break
    return sorted(found, key=lambda result: result["estimated_step_seconds"])


def meshes(config: RunConfig, topology: Slice) -> Iterator[dict[str, int]]:
    """FSDP inside a slice, then with tensor parallelism of 2, with two copies of the parameters, with split rows."""
    plain = dict(data=topology.count, fsdp=-1, tensor=1, context=1)
    yield plain
    if topology.chips > topology.count and config.model.n_kv_heads % 2 == 0:
        yield plain | dict(tensor=2)
    if topology.chips > 4 * topology.count:
        yield plain | dict(data=2 * topology.count)
    if config.data.row_length >= 4096:
        yield plain | dict(context=2)


def microbatch_counts(config: RunConfig, topology: Slice, mesh: dict[str, int]) -> list[int]:
    """Those that the batch divides into, fewest first."""
    rows = config.train.batch_size
    shards = topology.chips * topology.chip.devices // (mesh["tensor"] * mesh["context"])
    return [n for n in range(1, rows + 1) if rows % (n * shards) == 0]


def least_bytes(config: RunConfig, topology: Slice) -> float:
    """What a device holds at least: float32 weights, moments and gradients, and the float32 input of each layer."""
    m = model_config(config.model)
    devices, mesh = topology.chips * topology.chip.devices, config.mesh
    rows = config.train.batch_size / config.train.microbatches / devices * mesh.tensor
    layer = 2 * m.d_model * (m.n_heads + m.n_kv_heads) * m.head_dim + 3 * m.d_model * m.mlp_hidden_size
    weights = m.n_layers * layer + (2 - m.weight_tying) * m.embedding_size * m.d_model
    return 16 * weights / devices * mesh.data + 4 * rows * config.data.row_length * m.d_model * m.n_layers


def flags_of(config: RunConfig) -> str:
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in config.mesh.items() if size not in (1,))
    return f"{mesh} --config.model.remat={config.model.remat} --config.train.microbatches={config.train.microbatches}"


def _line(result: dict[str, Any]) -> str:
    size = f"{result['bytes_per_chip'] / 2**30:.1f} GiB"
    if not result["fits"]:
        return f"does not fit ({size})"
    return f"MFU {result['estimated_mfu']:.0%}, {rough(result['estimated_step_seconds'])} s, {size}"
