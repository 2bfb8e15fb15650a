"""From a compiled step to what it needs and takes: memory by class, collectives, seconds, MFU, days.

What the compiler can't know is assumed, and told with the result:
- The loop over chunks of scored positions has as many trips as the slowest device has scored chunks; the devices meet
  after it. Mask ratios are drawn as the objective draws them; of a fine-tuning row all is taken for answer.
- Attention kernels run at `chip.attention` of peak: 4·rows·heads·L²·H FLOPs forward, 2.5 times that backward; of a
  causal one, what the executed blocks of it hold. The head size of 128 fills half of a 256-wide matrix unit (v6e, 7x),
  hence the lower share there.
- The compiler prices large products at up to 97% of peak; measured ceilings are 90% (v6e) and 83% (7x). It doesn't know
  the clock under load either: read differences between settings rather than digits.
- Memory is what it is for any data: all loops have fixed buffers.
Not counted: the host, and lookups on sparse cores.
"""

import collections
import functools
import math
import re
from typing import Any

import jax
import numpy as np

from llada_jax.model.attention import splash_blocks
from llada_jax.model.transformer import Transformer, parameter_count
from llada_jax.objectives.cross_entropy import chunk_size
from llada_jax.objectives.noise import mask_ratios
from llada_jax.tools.ahead import hlo, links
from llada_jax.tools.ahead.compile import Compiled
from llada_jax.tools.ahead.cost import Cost, Machine
from llada_jax.training import metrics


def report(compiled: Compiled) -> dict[str, Any]:
    """All that is known of a step, in plain types: bytes, seconds, FLOPs; memory and collectives are one chip's."""
    c, topology = compiled.config, compiled.topology
    chip, chips = topology.chip, topology.chips
    result: dict[str, Any] = {
        "topology": str(topology), "chips": chips, "devices": compiled.mesh.size,
        "mesh": {axis: int(size) for axis, size in compiled.mesh.shape.items()},
        "batch_size": c.train.batch_size, "row_length": c.data.row_length, "microbatches": c.train.microbatches,
        "remat": compiled.model.remat, "parameters": parameter_count(compiled.model),
        "fits": compiled.fits, **memory(compiled), "compile_seconds": round(compiled.seconds, 1),
        "notes": compiled.notes,
    }  # fmt: skip
    if compiled.program is None:
        return result
    masks = expected_chunks(compiled)
    cost = play(compiled, masks["slowest"])
    scored = masks["share"] * c.train.batch_size * c.data.row_length
    flops = metrics.flops_per_step(compiled.model, c.train.batch_size, c.data.row_length, scored, c.lora.rank > 0)
    peak = chips * chip.flops
    tokens = c.train.batch_size * c.data.row_length
    ici = sum(t.ici_seconds * n for t, n in cost.transfers.items())
    dcn = sum(t.dcn_seconds * n for t, n in cost.transfers.items())
    host = [
        sum(t.host_seconds * n for t, n in cost.transfers.items() if t.kind == way) for way in ("to host", "from host")
    ]
    busy = sum(cost.work.values())
    return result | {
        "flops_per_step": flops,
        "estimated_step_seconds": cost.seconds,
        "estimated_mfu": flops / peak / cost.seconds,
        "tokens_per_second_per_chip": tokens / chips / cost.seconds,
        "all_transfers_hidden_seconds": max(busy, ici, dcn, *host),
        "all_transfers_exposed_seconds": busy + ici + dcn + sum(host),
        "parts": {
            **{f"{kind}_seconds": cost.work[kind] for kind in ("matmul", "vector", "attention")},
            "ici_seconds": ici, "dcn_seconds": dcn, "host_seconds": sum(host),
            "exposed_seconds": sum(cost.waits.values()), "exposed_by_kind": dict(cost.waits),
        },
        "estimated_cycles": cost.cycles,
        "transfers": transfers(cost, chip.devices),
        "steps": c.train.steps, "tokens": tokens * c.train.steps,
        "days": c.train.steps * cost.seconds / 86400, "chip_hours": c.train.steps * cost.seconds * chips / 3600,
        "heaviest": sorted(([s, name] for name, s in cost.heaviest.items()), reverse=True)[:12],
        "unpriced": dict(cost.unpriced),
        "assumed": {
            "scored_share": masks["share"], "chunks_of_slowest_device": masks["slowest"],
            "chunks_of_mean_device": masks["mean"], "attention_share_of_peak": chip.attention, "clock_hz": chip.clock,
        },
    }  # fmt: skip


def memory(compiled: Compiled) -> dict[str, Any]:
    """`bytes_per_chip` and its classes. Activations are what the scan over layers keeps for the backward pass."""
    n = compiled.topology.chip.devices
    kept = min(saved_activations(compiled), compiled.temporaries)
    classes = {
        "parameters": compiled.parameters,
        "optimizer": compiled.optimizer,
        "batch_and_padding": max(compiled.arguments - compiled.parameters - compiled.optimizer, 0),
        "activations": kept,
        "temporaries": compiled.temporaries - kept,
        "code": compiled.code,
    }
    return {
        "bytes_per_chip": n * sum(classes.values()),
        "bytes_per_chip_by_class": {name: int(n * size) for name, size in classes.items()},
        "capacity_bytes_per_chip": int(n * compiled.topology.chip.memory),
        "largest_buffers": [[n * size, shapes] for size, shapes in compiled.buffers],
    }


def saved_activations(compiled: Compiled) -> int:
    """Bytes, a device: the arrays [layers, …] that the forward scan hands on and that are no weights."""
    program = compiled.program or compiled.unscheduled
    layers = compiled.model.n_layers
    if program is None or layers < 2:
        return 0
    for loop in _loops(program):
        if program.trips(loop) == layers and "transpose(" not in loop.op_name:
            weights = _stacked_shapes(compiled)
            stacked = [(kind, dims) for kind, dims in hlo.arrays(hlo.without_host(loop.type)) if dims[:1] == (layers,)]
            kept = [(kind, dims) for kind, dims in stacked if _squeezed(dims) not in weights]
            return int(sum(hlo.array_bytes(f"{kind}[{','.join(map(str, dims))}]") for kind, dims in kept))
    return 0


def _loops(program: hlo.Program) -> list[hlo.Instruction]:
    return [i for instructions in program.computations.values() for i in instructions if i.opcode == "while"]


def _squeezed(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d != 1))


def _stacked_shapes(compiled: Compiled) -> set[tuple[int, ...]]:
    """Shapes of one device's part of the stacked weights, and of the whole ones."""
    with jax.set_mesh(compiled.mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        blocks = jax.eval_shape(lambda key: Transformer(compiled.model, key), key).blocks
    leaves = jax.tree.leaves(blocks)
    return {_squeezed(shape) for x in leaves for shape in (x.shape, x.sharding.shard_shape(x.shape))}


def play(compiled: Compiled, chunks: float) -> Cost:
    """The schedule played on one device, with so many trips of each loop over scored chunks."""
    assert compiled.program is not None
    chip, notes = compiled.topology.chip, compiled.notes

    @functools.cache
    def priced(kind: str, payload: float, group: tuple[int, ...]) -> links.Transfer:
        if not group:
            return links.host_transfer(kind, payload, compiled.topology)
        return links.transfer(kind, payload, list(group), compiled.mesh, compiled.topology)

    def trips(loop: hlo.Instruction) -> float:
        if "jvp(" in loop.op_name:  # the one over scored chunks is the only one whose length depends on data
            return chunks
        notes.append(f"a loop of unknown length is counted once: {loop.op_name or loop.name}")
        return 1.0

    forward = attention_flops(compiled)
    return Machine(
        compiled.program, clock=chip.clock, bandwidth=chip.memory_bandwidth / chip.devices,
        transfer=lambda kind, payload, group: priced(kind, payload, tuple(group)),
        kernel=lambda i: kernel_seconds(i, forward, chip.flops / chip.devices * chip.attention),
        loop_trips=trips, devices=compiled.mesh.size,
    ).run()  # fmt: skip


def kernel_seconds(i: hlo.Instruction, forward: float, speed: float) -> float | None:
    """Seconds of an attention kernel, told from others by the name that the splash kernels give themselves."""
    if "tpu_custom_call" not in i.text or not re.search(r"splash|flash|mha|attention", i.name + i.text):
        return None
    backward = re.search(r"(dkv|dq)", i.name + i.op_name)
    if not backward:
        return forward / speed
    fused = len(hlo.arrays(i.type)) > 2  # dq, dk and dv come out of one kernel
    return forward * (2.5 if fused else 1.5 if backward[1] == "dq" else 2.0) / speed


def attention_flops(compiled: Compiled) -> float:
    """Of one layer's forward attention on one device and microbatch, as far as the kernel executes it."""
    m, c, mesh = compiled.model, compiled.config, compiled.mesh.shape
    rows = c.train.batch_size / c.train.microbatches / (mesh["data"] * mesh["fsdp"])
    whole = 4 * rows * m.n_heads * c.data.row_length**2 * m.head_dim / (mesh["tensor"] * mesh["context"])
    return whole * executed_share(c.data.row_length, mesh["context"], m.head_dim) if m.causal else whole


def executed_share(length: int, shards: int = 1, head_dim: int = 128) -> float:
    """Of a causal layer's blocks of scores, in bfloat16; on the device with the end of the row, which executes most."""
    queries = length // shards
    block_q, block_kv = splash_blocks(queries, length, head_dim, itemsize=2)
    ends = np.arange(block_q, queries + block_q, block_q) + length - queries
    return float(np.mean(np.minimum(np.ceil(ends / block_kv) * block_kv / length, 1)))


def expected_chunks(compiled: Compiled, draws: int = 64) -> dict[str, float]:
    """Scored chunks in a microbatch, of the slowest device and the mean one, and the share of positions scored."""
    c, m, mesh = compiled.config, compiled.model, compiled.mesh.shape
    devices = mesh["data"] * mesh["fsdp"]
    rows = c.train.batch_size // (c.train.microbatches * devices)
    length = c.data.row_length // mesh["context"]
    chunk = chunk_size(rows * length, m.embedding_size // mesh["tensor"])
    total = math.ceil(rows * length / chunk)
    if c.objective.name == "autoregressive":
        return {"slowest": total, "mean": total, "share": 1.0}
    draw = functools.partial(
        mask_ratios,
        rows=c.train.batch_size,
        eps=c.objective.eps,
        stratified=c.objective.stratified,
        balanced=c.objective.balanced,
    )
    ratio = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), draws)))
    # A device holds rows that lie together, in the order of their ratios, and takes every so-manieth of them at once.
    of_device = np.sort(ratio.reshape(draws, devices, rows * c.train.microbatches))
    scored = of_device.reshape(draws, devices, rows, c.train.microbatches).sum(2).swapaxes(1, 2) * length
    trips = np.ceil(scored / chunk)
    return {
        "slowest": float(trips.max(-1).mean()),
        "mean": float(trips.mean()),
        "share": float((1 + c.objective.eps) / 2),
    }


def transfers(cost: Cost, devices_per_chip: int) -> list[dict[str, Any]]:
    """Of one chip and step: count, bytes of the whole arrays, seconds on the way; by kind, axes and network."""
    rows: dict[tuple, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for transfer, times in cost.transfers.items():
        row = rows[transfer.kind, "+".join(transfer.axes) or "none", transfer.network]
        row[0] += times
        row[1] += times * transfer.payload * devices_per_chip
        row[2] += times * transfer.seconds
    return [
        {"kind": kind, "axes": axes, "network": network, "count": count, "bytes": size, "seconds": seconds}
        for (kind, axes, network), (count, size, seconds) in sorted(rows.items(), key=lambda row: -row[1][2])
    ]
