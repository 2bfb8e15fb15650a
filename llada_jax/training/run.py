"""A training run: config → tokenizer → data → mesh → state → loop. Pre-training, fine-tuning and the control alike."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llada_jax.config import Lora, RunConfig, check_config
from llada_jax.data import KINDS, dataset, pipeline, prepare, sources
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError, RunFailed
from llada_jax.interop import hf, peft
from llada_jax.model.attention import kernel_for
from llada_jax.model.config import ModelConfig
from llada_jax.model.quantize import FEW_BITS
from llada_jax.model.transformer import parameter_count, with_config
from llada_jax.objectives import OBJECTIVES
from llada_jax.objectives.elbo import Batch, Objective
from llada_jax.parallel import chips, processes
from llada_jax.parallel.mesh import global_batch, make_mesh, platform, require_divides, rows_of_process
from llada_jax.storage import buckets, mirror
from llada_jax.storage.mirror import Workdir
from llada_jax.streams import stream
from llada_jax.training import checkpoint, optimizer, preemption, stability
from llada_jax.training import workdir as workdirs
from llada_jax.training.check import check, fit_to_tokenizer, phases
from llada_jax.training.loop import Loop, evaluator, sampler
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events, Goodput, Watchdog
from llada_jax.training.step import TrainState, adapted_state, init_state, make_train_step

Stored = dict[str, Any] | None  # the config of the run that a workdir holds


def train(
    config: RunConfig, workdir: str | Path, *, title: str = "train", allow_config_change: bool = False,
    signals: preemption.Signals | None = None,
) -> dict[str, float]:  # fmt: skip
    """Runs what `config` says in `workdir`, from its newest checkpoint if it has one; returns the last scalars.

    A workdir may be gs://BUCKET/NAME or s3://BUCKET/NAME: see mirror.Workdir.
    A run that continues may have another learning rate with `allow_config_change`. signals: those of a program that
    listens already. Raises InputError for whatever a user can get wrong, found before the first step, RunFailed for
    what goes wrong later, and cli.Preempted after SIGTERM or Ctrl-C.
    """
    begun, config = time.time(), config.copy_and_resolve_references()
    with contextlib.ExitStack() as stack:
        with processes.all_or_none():
            check_config(config)
            processes.agree("config or --workdir", [config.to_dict(), str(workdir)])
            home = stack.enter_context(mirror.opened(workdir, config.data.cache_dir))
            if not home.is_mirror and home.local.exists() and not home.local.is_dir():
                raise InputError(f"{workdir}: is a file; --workdir names a directory")
        return _train(config, home, begun, title, allow_config_change, signals or preemption.Signals())


def _train(
    config: RunConfig, home: Workdir, begun: float, title: str, allow_config_change: bool, signals: preemption.Signals
) -> dict[str, float]:  # fmt: skip
    processes.on_first_process(home.fetch)
    stored = processes.on_first_process(lambda: workdirs.begun(home, config))
    with processes.all_or_none():
        check(config, jax.device_count(), stored)
        if config.lora.rank and not config.train.init_from:
            raise InputError("config.lora.rank trains adapters of a model; name it with --config.train.init_from=DIR")
        kernel_for(config.model.attention_kernel, platform(), config.model.dtype)
        mesh = make_mesh(dict(config.mesh))
    with jax.set_mesh(mesh), _taken(home, signals) as lease:
        processes.on_first_process(home.fetch)  # again: the run before may have written while its end was waited for
        while True:
            with _nothing_left_behind(home, stored):
                run = _set_up(config, home, mesh, stored, begun, title, allow_config_change, signals, lease)
            try:
                with _pushed_at_the_end(home):
                    return _steps(run, config, signals)
            except stability.Diverged as error:
                failure = error.with_traceback(None)  # which would keep the state in memory
            del run
            processes.on_first_process(functools.partial(_roll_back, home, config.train, failure))
            begun, stored = time.time(), processes.on_first_process(lambda: workdirs.begun(home, config))


def _roll_back(home: Workdir, fields, failure: stability.Diverged) -> None:
    place = checkpoint.discard_after(home.remote, failure.step - fields.rollback_after)
    try:
        print(stability.record_rollback(home.local, failure, place, fields), file=sys.stderr)
    finally:
        home.push()


@contextlib.contextmanager
def _pushed_at_the_end(home: Workdir) -> Iterator[None]:
    """However the steps end, what was reported of them comes to the bucket, if it can be reached."""
    try:
        yield
    except BaseException:
        if processes.is_first():
            try:
                home.push()
            except (InputError, RunFailed) as error:  # what ended the steps matters more
                print(error, file=sys.stderr)
        raise
    processes.on_first_process(home.push)


@contextlib.contextmanager
def _taken(home: Workdir, signals: preemption.Signals) -> Iterator[workdirs.Lease | None]:
    """The workdir is this run's alone until the end; the lease, which only the first process has."""
    leases: list[workdirs.Lease] = []
    processes.on_first_process(lambda: leases.append(workdirs.Lease(home.remote)))
    if not leases:
        yield None
        return
    release = lambda *_: leases[0].release()
    signals.before_end.append(release)
    try:
        yield leases[0]
    finally:
        signals.before_end.remove(release)
        leases[0].release()


@contextlib.contextmanager
def _nothing_left_behind(home: Workdir, stored: Stored) -> Iterator[None]:
    """If a mistake of the user's keeps a run from beginning, removes what was made for it in the workdir."""
    before = {path.name for path in home.local.iterdir()} if processes.is_first() else set()
    try:
        yield
    except InputError:
        if processes.is_first() and stored is None:
            for path in [path for path in home.local.iterdir() if path.name not in before]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            home.push()
        raise


class _Ready(NamedTuple):
    """A run before its first step."""

    loop: Loop
    state: TrainState
    step_fn: Any
    batches: Iterator[Batch]
    first: int  # the step that it goes on from


def _set_up(
    config: RunConfig, home: Workdir, mesh, stored: Stored, begun: float, title: str, allow_config_change: bool,
    signals: preemption.Signals, lease: workdirs.Lease | None,
) -> _Ready:  # fmt: skip
    workdir = home.local
    with processes.all_or_none():
        optax_optimizer, step_fn, options, refused = training_step(config, mesh)
        was_begun = stored is None and processes.on_first_process(lambda: workdirs.reserve(workdir, config))
        tokenizer, rows, validation = open_data(config, home, resumed=stored is not None, replaces=was_begun)
        model = fit_to_tokenizer(config, tokenizer, stored)
        if config.lora.rank:
            config.lora.fingerprint = peft.fingerprint(mirror.copied(config.train.init_from))
        require_divides(model, mesh, config.data.row_length)
        datasets = [source.path for source in (*rows.sources, *filter(None, [validation]))]

        def claim() -> None:
            assert lease is not None
            lease.confirm()
            dataset.require_unchanged(workdir, datasets)
            workdirs.claim(home, config, stored, allow_change=allow_config_change)
            tokenizer.save(workdir / "tokenizer")
            if config.train.init_from and stored is None:
                hf.copy_companions(config.train.init_from, workdir / "tokenizer")
            home.push()

        processes.on_first_process(claim)
        _require_shared(home, "config.json")

    clock, events = Goodput(workdir, begun), Events(workdir)
    saver = checkpoint.Checkpointer(home.remote, config, events, on_saved=clock.saved)
    state, notes = _start(config, model, optax_optimizer, saver, mesh, options, clock)
    first = int(state.step)
    rollback = processes.on_first_process(lambda: stability.rollback_to(workdir, first))
    state.guard = stability.resumed(state.guard, rollback)
    with processes.all_or_none():
        reporter = Reporter(
            workdir, model, rows=config.train.batch_size, length=config.data.row_length,
            tokens_per_byte=_tokens_per_byte(rows), schedule=optimizer.make_schedule(
                config.optimizer.schedule, **phases(config)
            ), total_steps=config.train.steps, first_step=first, log_every=config.train.log_every, title=title,
            notes=notes, goodput=clock, events=events, frozen=config.lora.rank > 0,
        )  # fmt: skip
    reporter.say(_opening(model, mesh, home, first, config.train.steps, title))
    if config.lora.rank:
        count = sum(x.size for x in jax.tree.leaves(state.trainable))
        reporter.say(f"trains {count:,} parameters of adapters; the base is {config.lora.base}, and frozen")
    for line in refused:
        reporter.say(line)
    offset = int(state.guard.offset)
    rows = dataclasses.replace(rows, on_damage=_on_damage(config, events, offset))
    loop = Loop(
        config, saver, reporter, preemption.Requests(mesh, config.checkpoint.every_minutes, signals), clock, events,
        push=home.push,
        evaluate=evaluator(config, validation, tokenizer, mesh, options) if validation else None,
        sample=sampler(config, tokenizer) if config.train.sample_prompt else None,
    )  # fmt: skip
    return _Ready(loop, state, step_fn, _batches(config, rows, tokenizer, first, mesh, offset), first)


def _steps(run: _Ready, config: RunConfig, signals: preemption.Signals) -> dict[str, float]:
    """From here on a signal asks the run to save, and nothing that goes wrong is a mistake of the user's."""
    loop, state, step_fn, batches, first = run
    watch = Watchdog(loop.clock, loop.events, config.train.stall_seconds)
    with contextlib.closing(loop.reporter), contextlib.closing(watch), contextlib.closing(loop.saver), signals.asking():
        try:
            return loop.run(state, step_fn, stream(config.train.seed, "train"), batches, first)
        except InputError as error:
            failed: Any = RunFailed(str(error))
            failed.shared = getattr(error, "shared", False)
            raise failed from error


def training_step(config: RunConfig, mesh, objective: Objective | None = None):
    """(optimizer, jitted step, its compiler options, lines on options left out): what a config means on a mesh.

    objective: in place of that of the config.
    ahead/ compiles the same for devices that are not there.
    """
    objective = objective or OBJECTIVES[config.objective.name]
    optax_optimizer = optimizer.make_optimizer(config.optimizer, **phases(config))
    options, refused = chips.of_mesh(mesh)
    step_fn = make_train_step(
        optax_optimizer, objective, config.objective, microbatches=config.train.microbatches,
        spike_sigma=config.train.spike_sigma, rollback_after=config.train.rollback_after, compiler_options=options,
    )  # fmt: skip
    return optax_optimizer, step_fn, options, refused


def _start(config: RunConfig, model: ModelConfig, optax_optimizer, saver, mesh, options, clock):
    """State and notes of the newest checkpoint; else a fresh state, with the weights of `init_from` if that is set."""
    if config.lora.rank:
        return _start_adapters(config, model, optax_optimizer, saver, mesh, clock)
    clock.enter("restore")
    restored = saver.restore(_abstract_state(model, optax_optimizer, mesh))
    clock.enter("start")
    if restored is not None:
        return restored
    init = jax.jit(init_state, static_argnums=(0, 1), compiler_options=options)
    state = init(model, optax_optimizer, stream(config.train.seed, "init"))
    if config.train.init_from:
        weights = jax.tree.leaves(hf.load(config.train.init_from, "float32", mesh))
        state.trainable = jax.tree.unflatten(jax.tree.structure(state.trainable), weights)
    return state, {}


def _start_adapters(config: RunConfig, model: ModelConfig, optax_optimizer, saver, mesh, clock):
    """`_start` where adapters are trained: checkpoints hold them alone, and the base is loaded every time."""
    c = Lora(**config.lora)
    quantize = c.base if c.base in FEW_BITS else None
    dtype = "float32" if c.base == "float32" else "bfloat16"
    base = with_config(hf.load(config.train.init_from, dtype, mesh, quantize=quantize), model)
    state = adapted_state(base, c, optax_optimizer, stream(config.train.seed, "init"))
    frozen, state.frozen = state.frozen, None
    clock.enter("restore")
    restored = saver.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
    clock.enter("start")
    state, notes = restored or (state, {})
    state.frozen = frozen
    return state, notes


def _abstract_state(model: ModelConfig, optax_optimizer, mesh) -> TrainState:
    """Shapes, types and shardings of a state, which take no memory. For use where the mesh is set."""
    like = jax.eval_shape(lambda key: init_state(model, optax_optimizer, key), jax.random.key(0))
    spec = lambda x: P() if x.sharding is None else x.sharding.spec  # of a scalar JAX may know none
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))), like)


def _require_shared(home: Workdir, name: str) -> None:
    """Raises InputError where this process does not see what the first one wrote; NFS may take some seconds."""
    path = home.remote / name
    for _ in range(10):
        if buckets.exists(path) if home.is_mirror else path.exists():
            return
        time.sleep(1)
    raise InputError(
        f"process {jax.process_index()} does not see {path}, which process 0 wrote; --workdir must be on a file "
        "system that all hosts share"
    )


def _opening(model: ModelConfig, mesh, workdir: Workdir, first: int, total: int, title: str) -> str:
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    start = f"from step {first}" if first else "from the start"
    kernel = kernel_for(model.attention_kernel, platform())
    return (
        f"{title}: {parameter_count(model):,} parameters, {total} steps {start}, mesh {sizes}, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, {kernel} attention; workdir {workdir}"
    )


def open_data(config: RunConfig, home: Workdir, *, resumed: bool = False, replaces: bool = False):
    """(tokenizer, order of training rows, validation rows or None). Files are prepared into data/ of the workdir.

    Prepared data that lies in a bucket is copied to `config.data.cache_dir` once.
    resumed: neither the files that were prepared nor the model that the run started from are looked at again.
    replaces: what a start that never saved has prepared there may be replaced.
    """
    data = config.data
    path = mirror.copied(data.path, data.cache_dir) if data.path else home.local / "data"
    weighted = [(path, 1.0), *pipeline.parse_mixture(data.mixture)]
    if not data.path:
        processes.on_first_process(lambda: _prepare(config, home, path, resumed, replaces))
        _require_shared(home, "data/manifest.json")
        if not processes.is_first():
            home.fetch("data/")
    opened = [dataset.open_dataset(mirror.copied(other, data.cache_dir)) for other, _ in weighted]
    pipeline.require_fields(opened, data.kind)
    tokenizer = load_tokenizer(opened[0].tokenizer_path)
    for source in opened:
        if source.row_length != data.row_length:
            raise InputError(
                f"{source.path}: its rows are {source.row_length} long, config.data.row_length is {data.row_length}"
            )
    if config.train.init_from and not resumed:
        _same_tokenizer(tokenizer, config.train.init_from, opened[0].path)
    weights = [weight for _, weight in weighted]
    order = pipeline.ordered(opened, weights, config.train.seed)
    held_out = path / "validation"
    validation = dataset.open_dataset(held_out) if (held_out / "manifest.json").exists() else None
    if len(opened[0]) == 0:
        raise InputError(f"{path}: holds no rows; give more text")
    return tokenizer, order, validation


def _on_damage(config: RunConfig, events: Events, offset: int):
    """What the pipeline calls for a damaged row; None: it stops the run. offset: batches that rollbacks left out."""
    if config.data.on_damage == "stop":
        return None

    def report(position: int, cause: str, action: str) -> None:
        print(f"{cause}; {action}", file=sys.stderr)
        step = position // config.train.batch_size + 1 - offset
        events.write("damaged row", step=step, cause=cause, action=action, own=True)

    return report


def _prepare(config: RunConfig, home: Workdir, path: Path, resumed: bool, replaces: bool) -> None:
    data, place = config.data, path / "manifest.json"
    if resumed and place.exists():
        return
    do = functools.partial(
        prepare.prepare_dataset, path, kind=data.kind, files=data.files, tokenizer=_tokenizer(config, home.local),
        row_length=data.row_length, packing=data.packing, documents=data.documents, overlong=data.overlong,
        validation_fraction=data.validation_fraction,
    )  # fmt: skip
    try:
        do()
    except InputError:
        if not replaces or not place.exists():
            raise
        shutil.rmtree(path)
        do()
    home.push()  # for the other processes


def _tokenizer(config: RunConfig, workdir: Path) -> Tokenizer:
    """The one that the config names, that of the model it starts from, or one trained on the files."""
    data = config.data
    if data.tokenizer:
        return load_tokenizer(mirror.copied(data.tokenizer, data.cache_dir))
    if config.train.init_from:
        return load_tokenizer(hf.tokenizer_directory(config.train.init_from))
    path = workdir / "tokenizer" / "tokenizer.model"
    if path.exists():
        return load_tokenizer(path)
    if data.kind == "chat":
        raise InputError("config.data.tokenizer is empty; fine-tuning needs the tokenizer of the model it starts from")
    files = sources.expand_files(data.files)
    texts = (text for file in files for text in sources.read_documents(file, data.documents))
    return train_tokenizer(texts, path, data.vocab_size, data.tokenizer_type)


def _same_tokenizer(tokenizer: Tokenizer, init_from: str, data_path: Path) -> None:
    directory = hf.tokenizer_directory(init_from)
    if load_tokenizer(directory).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{data_path}: made with another tokenizer than the model in {init_from}; prepare it with "
            f"--tokenizer={directory}"
        )


def _batches(config, order, tokenizer, first, mesh, offset=0) -> Iterator[Batch]:
    """The batches from step `first` on, placed on the devices two steps before they are asked for.

    offset: how many batches rollbacks have left out.
    """
    size = config.train.batch_size
    rows = pipeline.batches(
        order, batch_size=size, kind=config.data.kind, start_step=first + offset,
        num_steps=config.train.steps + offset, seed=config.train.seed, eos_id=tokenizer.eos_id,
        only=rows_of_process(mesh, size), threads=config.data.threads,
        **{name: config.data[name] for name in KINDS[config.data.kind].options},
    )  # fmt: skip
    placed = (_placed(batch, mesh, size) for batch in rows)
    ahead = collections.deque(itertools.islice(placed, 2))
    while ahead:
        ahead.extend(itertools.islice(placed, 1))
        yield ahead.popleft()


def _placed(batch: dict[str, np.ndarray], mesh, batch_size: int) -> Batch:
    return {name: global_batch(x, mesh, batch_size) for name, x in batch.items()}


def _tokens_per_byte(order: pipeline.Order) -> float | None:
    """Of the text that a loss may ask for; None where a dataset was prepared before that was counted."""
    scored = [source.scored_tokens for source in order.sources]
    if None in scored:
        return None
    return sum(filter(None, scored)) / max(sum(source.manifest["bytes"] for source in order.sources), 1)
