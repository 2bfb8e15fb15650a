"""The sampler compiled for a slice that is not there: its memory, and what a full and a window pass take.

The whole program (blocks in passes in layers) gives the memory; a pass of each kind, compiled by itself, the seconds.
B rows, S columns of the canvas, W columns of a block.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.model import lora
from llada_jax.model.config import PRESETS, ModelConfig
from llada_jax.model.masks import Mask
from llada_jax.model.transformer import Transformer, parameter_count
from llada_jax.parallel.mesh import BATCH, make_mesh, require_divides
from llada_jax.sampling import cache, denoise
from llada_jax.tools.ahead import hlo, links
from llada_jax.tools.ahead.compile import caching_in, dumped
from llada_jax.tools.ahead.cost import Machine
from llada_jax.tools.ahead.estimate import kernel_seconds
from llada_jax.tools.ahead.slices import Slice, absent_devices
from llada_jax.tools.ahead.text import ERROR, rough


@dataclasses.dataclass(frozen=True)
class Job:
    """What is sampled: `rows` prompts at once, one token a pass unless tokens_per_pass says how many."""

    rows: int = 8
    prompt_length: int = 512
    gen_length: int = 256
    block_length: int = 32
    tokens_per_pass: float = 1.0


def compile_sampler(preset: str, topology: Slice, job: Job, weights_as: str = "bfloat16") -> dict[str, Any]:
    """All that is known of it, in plain types. The weights are split over `tensor` as far as heads allow.

    weights_as: "bfloat16", or one of quantize.FEW_BITS for those of the blocks.
    """
    model = dataclasses.replace(PRESETS[preset], dtype="bfloat16", remat="none")
    devices = absent_devices(topology)
    tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and model.n_kv_heads % n == 0)
    mesh = make_mesh(dict(data=-1, fsdp=1, tensor=tensor, context=1), devices)
    require_divides(model, mesh)
    rows = job.rows * mesh.shape["data"]
    start = time.perf_counter()
    with jax.set_mesh(mesh), caching_in(None):
        weights = _weights(model, mesh, weights_as)
        caches = {name: _whole_program(weights, model, mesh, rows, job, name) for name in ("none", "two_block")}
        seconds = {
            name: _pass_seconds(program, arguments, mesh, topology, model, rows, job)
            for name, (program, arguments) in _passes(weights, mesh, rows, job).items()
        }
    passes = {  # of one token a pass in every row: the first block, then each next one with the one before
        "none": {"full": job.gen_length}, "two_block": {"full": 1, "window": job.gen_length - 1},
    }  # fmt: skip
    total = {
        name: sum(seconds[kind] * count for kind, count in counts.items()) / job.tokens_per_pass
        for name, counts in passes.items()
    }
    return {
        "model": preset, "topology": str(topology), "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "parameters": parameter_count(model), "rows": rows, "columns": job.prompt_length + job.gen_length,
        "block_length": job.block_length, "weights": weights_as, "capacity_bytes": int(topology.chip.memory),
        "bytes_per_device": caches, "seconds_per_full_pass": seconds["full"],
        "seconds_per_window_pass": seconds["window"],
        "tokens_per_second_per_chip": {
            name: rows * job.gen_length / seconds / topology.chips for name, seconds in total.items()
        },
        "compile_seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def describe(found: dict[str, Any]) -> str:
    """What tools/compile_ahead.py --sampler prints."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1) or "one device"
    lines = [
        f"{found['model']} on {found['topology']}, {mesh}; {found['weights']}; {found['rows']} rows of "
        f"{found['columns']} columns, blocks of {found['block_length']}",
        f"estimate {ERROR}: a full pass {rough(1e3 * found['seconds_per_full_pass'])} ms, a window pass "
        f"{rough(1e3 * found['seconds_per_window_pass'])} ms",
    ]
    for name, size in found["bytes_per_device"].items():
        fits = "fits" if size <= found["capacity_bytes"] else "DOES NOT FIT"
        speed = found["tokens_per_second_per_chip"][name]
        lines.append(
            f"cache {name}: {fits}, {size / 2**30:.1f} of {found['capacity_bytes'] / 2**30:.1f} GiB a device; "
            f"{rough(speed)} tokens/s/chip at one token a pass"
        )
    return "\n".join(lines)


def _weights(model: ModelConfig, mesh, weights_as: str) -> Any:
    """Those of a model that was loaded so, as shapes and shardings."""
    like = jax.eval_shape(lambda: lora.frozen_base(Transformer(model, jax.random.key(0)), weights_as))
    return jax.tree.map(
        lambda x: _on(mesh, x), jax.eval_shape(cache.prepare, jax.tree.map(lambda x: _on(mesh, x), like))
    )


def _of_rows(mesh, *shape: int, dtype=jnp.int32) -> Any:
    """An array whose first axis, the rows, is split over the copies of the model."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(BATCH, *[None] * (len(shape) - 1))))


def _on(mesh, x, *axes) -> Any:
    spec = x.sharding.spec if not axes and x.sharding is not None else P(*axes)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _whole_program(weights, model: ModelConfig, mesh, rows: int, job: Job, name: str) -> int:
    """Bytes that it takes on a device, weights and keys included."""
    S = job.prompt_length + job.gen_length
    one: Any = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    key: Any = jax.eval_shape(lambda: jax.random.key(0))
    numbers: dict[str, Any] = {
        **dict.fromkeys(("start", "steps", "refresh", "mask_id", "eos_id", "banned_id"), one(jnp.int32)),
        **dict.fromkeys(("limit", "temperature", "cfg_scale"), one(jnp.float32)),
    }
    settings = denoise.Settings(**numbers, last_ids=one(jnp.int32, 2), key=_on(mesh, key), rows=_of_rows(mesh, rows))
    program = denoise.Program(
        job.block_length, name, "quota", "low_confidence", guided=False, growing=False, stops=False, left=0, width=0
    )
    canvas, visible = _of_rows(mesh, rows, S), _of_rows(mesh, rows, S, dtype=jnp.bool_)
    memory: Any = denoise.run.lower(weights, canvas, visible, program, settings).compile().memory_analysis()
    return int(
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip


def _passes(weights, mesh, rows: int, job: Job) -> dict[str, tuple[Any, tuple]]:
    """(function, abstract arguments) of a pass over the canvas and one over a block beside what was kept."""
    S, W, c = job.prompt_length + job.gen_length, job.block_length, weights.config
    split = NamedSharding(mesh, P(None, BATCH, "tensor", None, None))
    kept = lambda *shape: jax.ShapeDtypeStruct((c.n_layers, rows, c.n_kv_heads, *shape), jnp.bfloat16, sharding=split)

    def full(w, tokens_BS, positions_BS, segments_BS):  # as without a cache, which runs it for every token
        hidden_BSD, _ = cache.full_pass(w, tokens_BS, Mask(segment_ids=segments_BS), positions_BS, False)
        return _best(w, hidden_BSD[:, -W:])

    def window(w, tokens_BW, positions_BW, keys, visible_BS):
        hidden_BWD, _ = cache.window_pass(w, tokens_BW, positions_BW, keys, visible_BS)
        return _best(w, hidden_BWD)

    return {
        "full": (full, (weights, _of_rows(mesh, rows, S), _of_rows(mesh, rows, S), _of_rows(mesh, rows, S))),
        "window": (
            window,
            (
                weights,
                _of_rows(mesh, rows, W),
                _of_rows(mesh, rows, W),
                (kept(c.head_dim, S), kept(S, c.head_dim)),
                _of_rows(mesh, rows, S, dtype=jnp.bool_),
            ),
        ),
    }


def _best(w, hidden_BWD):
    out_BWV = cache.logits(w, hidden_BWD)
    return jnp.argmax(out_BWV, axis=-1), jax.nn.logsumexp(out_BWV, axis=-1)


def _pass_seconds(function, arguments, mesh, topology: Slice, model: ModelConfig, rows: int, job: Job) -> float:
    with tempfile.TemporaryDirectory() as dump:
        jax.jit(function).lower(*arguments).compile(compiler_options={"xla_dump_to": dump})
        program = hlo.parse(dumped(Path(dump), "after_codegen"))
    chip, S = topology.chip, job.prompt_length + job.gen_length
    forward = 4 * rows / mesh.shape["data"] * model.n_heads * S**2 * model.head_dim / mesh.shape["tensor"]
    return Machine(
        program, clock=chip.clock, bandwidth=chip.memory_bandwidth / chip.devices,
        transfer=lambda kind, payload, group: links.transfer(kind, payload, list(group), mesh, topology),
        kernel=lambda i: kernel_seconds(i, forward, chip.flops / chip.devices * chip.attention),
        loop_trips=lambda loop: 1.0, devices=mesh.size,
    ).run().seconds  # fmt: skip
