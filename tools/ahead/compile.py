"""Compiles the trainer's own step for a slice that is not there, and keeps what the compiler tells of it."""

import contextlib
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.config import Lora, RunConfig
from llada_jax.fields import InputError
from llada_jax.model import lora
from llada_jax.model.config import ModelConfig, model_config
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.chips import GIB
from llada_jax.parallel.mesh import make_mesh, require_divides, rows_sharding
from llada_jax.tools.ahead import hlo
from llada_jax.tools.ahead.slices import Slice, absent_devices
from llada_jax.training import run as train
from llada_jax.training.step import adapted_state, init_state


@dataclasses.dataclass
class Compiled:
    """A step that was compiled, or was found not to fit. Bytes are of one device."""

    config: RunConfig
    model: ModelConfig
    topology: Slice
    mesh: jax.sharding.Mesh
    parameters: int
    optimizer: int
    batch: int
    arguments: int  # as the device lays them out, with the padding of tiles
    temporaries: int  # all that lives only during the step
    code: int
    fits: bool
    program: hlo.Program | None  # scheduled and priced; None if it does not fit
    unscheduled: hlo.Program | None  # the same before memory was assigned
    buffers: list[tuple[int, str]]  # the largest: bytes, which arrays share them
    seconds: float  # that compiling took
    notes: list[str]


def compile_step(
    config: RunConfig, topology: Slice, *, options: dict[str, Any] | None = None, cache: str | None = None
) -> Compiled:
    """Compiles what `llada_jax.train` would run with this config on that slice.

    Needs neither data nor tokenizer: sizes come from the config. `options`: compiler options besides the trainer's own.
    `cache`: a directory of JAX's persistent compilation cache to put the executable into. Raises InputError for a
    config that can't run there.
    """
    config = config.copy_and_resolve_references()
    config.train.init_from = ""  # weights are not looked at
    if not config.model.vocab_size:
        raise InputError("config.model.vocab_size is the tokenizer's, which is not read here; set it: "
                         "--config.model.vocab_size=8192")  # fmt: skip
    config.model.embedding_size = config.model.embedding_size or -(-config.model.vocab_size // 64) * 64
    model = model_config(config.model)
    mesh = make_mesh(dict(config.mesh), absent_devices(topology))
    train.check(config, mesh.size)
    require_divides(model, mesh, config.data.row_length)
    start = time.perf_counter()
    with jax.set_mesh(mesh), caching_in(cache), tempfile.TemporaryDirectory() as dump:
        optax_optimizer, step_fn, _, notes = train.training_step(config, mesh)
        state, batch, key = abstract_arguments(config, model, optax_optimizer, mesh)
        sizes = dict(
            parameters=_device_bytes(state.model), optimizer=_device_bytes(state.opt_state), batch=_device_bytes(batch)
        )
        lowered = step_fn.lower(state, batch, key)
        memory, needed = None, 0
        try:
            memory = lowered.compile(compiler_options={"xla_dump_to": dump, **(options or {})}).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            needed = _temporaries_of(str(error))
        texts = {
            name: dumped(Path(dump), name) for name in ("after_codegen", "after_optimizations", "memory-usage-report")
        }
    assert memory is None or texts["after_codegen"], "the compiler wrote no dump"
    counted = dict(
        arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes
        - memory.alias_size_in_bytes, code=memory.generated_code_size_in_bytes,
    ) if memory else dict(arguments=sum(sizes.values()), temporaries=needed, code=0)  # fmt: skip
    return Compiled(
        config=config, model=model, topology=topology, mesh=mesh, **sizes, **counted,
        fits=memory is not None and sum(counted.values()) <= topology.chip.memory,
        program=hlo.parse(texts["after_codegen"]) if memory else None,
        unscheduled=hlo.parse(texts["after_optimizations"]) if texts["after_optimizations"] else None,
        buffers=_buffers(texts["memory-usage-report"]), seconds=time.perf_counter() - start, notes=notes,
    )  # fmt: skip


@contextlib.contextmanager
def caching_in(directory: str | None) -> Iterator[None]:
    """Executables go to `directory` only, or nowhere: one for absent devices can be written, but not read back."""
    wanted: dict[str, Any] = dict(
        jax_enable_compilation_cache=directory is not None,
        jax_persistent_cache_min_compile_time_secs=0.0,
    )
    if directory:
        wanted["jax_compilation_cache_dir"] = directory
    before = {name: getattr(jax.config, name) for name in wanted}
    compilation_cache.reset_cache()  # it reads its settings once
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def abstract_arguments(config: RunConfig, model: ModelConfig, optax_optimizer, mesh: jax.sharding.Mesh):
    """(state, batch, key) of a step as shapes, types and shardings on `mesh`, which must be set."""

    def on_mesh(x):
        spec = x.sharding.spec if x.sharding is not None else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    key = on_mesh(jax.eval_shape(lambda: jax.random.key(0)))
    make = lambda k: init_state(model, optax_optimizer, k)
    if config.lora.rank:
        c = Lora(**config.lora)
        make = lambda k: adapted_state(lora.frozen_base(Transformer(model, k), c.base), c, optax_optimizer, k)
    state = jax.tree.map(on_mesh, jax.eval_shape(make, key))
    rows = config.train.batch_size, config.data.row_length
    fields = dict(
        tokens=(2, jnp.int32), segment_ids=(2, jnp.int32), maskable=(2, jnp.bool_), answer_length=(1, jnp.int32)
    )
    batch = {
        name: jax.ShapeDtypeStruct(rows[:ndim], dtype, sharding=rows_sharding(mesh, ndim))
        for name, (ndim, dtype) in fields.items()
    }
    return state, batch, key


def _device_bytes(tree) -> int:
    """Bytes of one device's part."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def dumped(dump: Path, name: str) -> str:
    """The newest file of that name: the step's, which is compiled last."""
    files = sorted(dump.glob(f"*.{name}.txt"), key=lambda path: path.stat().st_mtime) or sorted(
        dump.glob(f"*{name}.txt")
    )
    return files[-1].read_text() if files else ""


def _temporaries_of(message: str) -> int:
    """The bytes that a program needed and did not get, from the compiler's message. Other errors are raised again."""
    if "RESOURCE_EXHAUSTED" not in message:
        line = next(line for line in message.splitlines() if line.strip())
        raise InputError(f"the compiler refused the step: {line[:300]}")
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?) of", message)
    if not found:
        return 0
    number, unit = found[1] or found[3], found[2] or found[4]
    return round(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}[unit])


def _buffers(report: str, most: int = 8) -> list[tuple[int, str]]:
    """The largest buffers of the device's memory: bytes, and the arrays that live in them one after another."""
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}
    lines = re.findall(
        r"^\s+[\d.]+\w+\(\s*\d+%\);\s+([\d.]+)(B|KiB|MiB|GiB);\s+\d+;\s+\d+; (.*)$", report, re.MULTILINE
    )
    return [(round(float(size) * units[unit]), shapes) for size, unit, shapes in lines[:most]]
