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

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.config import RunConfig, check_config
from llada_jax.data import KINDS, dataset, pipeline, prepare, sources
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.fields import InputError
from llada_jax.interop import families, hf
from llada_jax.model.attention import kernel_for
from llada_jax.model.config import ModelConfig, model_config
from llada_jax.model.transformer import parameter_count
from llada_jax.objectives import OBJECTIVES
from llada_jax.objectives.elbo import Batch
from llada_jax.parallel import chips, processes
from llada_jax.parallel.mesh import global_batch, make_mesh, mesh_shape, platform, require_divides, rows_of_process
from llada_jax.sampling import prompts
from llada_jax.streams import stream
from llada_jax.training import checkpoint, optimizer, preemption, stability
from llada_jax.training.loop import Loop
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events, Goodput, Watchdog
from llada_jax.training.step import init_state, make_eval_step, make_train_step


def train(
    config: RunConfig, workdir: str | Path, *, title: str = "train", allow_config_change: bool = False
) -> dict[str, float]:
    """Runs what `config` says in `workdir`, from its newest checkpoint if it has one; returns the last scalars.

    A run that continues may have another learning rate with `allow_config_change`. Raises InputError for whatever a
    user can get wrong, before anything is written where that is possible, and where the numbers go wrong again after
    each rollback; cli.Preempted after a SIGTERM.
    """
    while True:
        try:
            return _train(config, workdir, title, allow_config_change)
        except stability.Diverged as error:
            failure = error.with_traceback(None)  # which would keep the state in memory
        processes.on_first_process(functools.partial(_roll_back, Path(workdir), config.train, failure))


def _roll_back(workdir: Path, fields, failure: stability.Diverged) -> None:
    place = checkpoint.discard_after(workdir, failure.step - fields.rollback_after)
    print(stability.record_rollback(workdir, failure, place, fields), file=sys.stderr)


def _train(config: RunConfig, workdir: str | Path, title: str, allow_config_change: bool) -> dict[str, float]:
    begun = time.time()
    if "://" in str(workdir):
        raise InputError(f"--workdir={workdir}: mount the bucket, with gcsfuse say, and give the mounted directory")
    workdir = Path(workdir)
    config = config.copy_and_resolve_references()
    total, rows_per_step = config.train.steps, config.train.batch_size
    with _nothing_left_behind(workdir), processes.all_or_none():
        processes.agree("config or --workdir", [config.to_dict(), str(workdir)])
        check(config, jax.device_count())
        kernel_for(config.model.attention_kernel, platform(), config.model.dtype)
        mesh = make_mesh(dict(config.mesh))
        optax_optimizer, step_fn, options, refused = training_step(config, mesh)
        if workdir.exists() and not workdir.is_dir():
            raise InputError(f"{workdir}: is a file; --workdir names a directory")
        tokenizer, rows, validation = open_data(config, workdir)
        model = fit_to_tokenizer(config, tokenizer)
        require_divides(model, mesh, config.data.row_length)
        datasets = [source.path for source in (*rows.sources, *filter(None, [validation]))]
        processes.on_first_process(lambda: _claim(workdir, config, tokenizer, datasets, allow_config_change))
        _require_shared(workdir / "config.json")

    clock, events = Goodput(workdir, begun), Events(workdir)
    with jax.set_mesh(mesh):
        saver = checkpoint.Checkpointer(workdir, config)
        state, notes = _start(config, model, optax_optimizer, saver, mesh, options, clock)
        first = int(state.step)
        state.guard = stability.resumed(
            state.guard, processes.on_first_process(lambda: stability.rollback_to(workdir, first))
        )
        schedule = optimizer.make_schedule(config.optimizer.schedule, **_phases(config))
        with processes.all_or_none():
            reporter = Reporter(
                workdir, model, rows=rows_per_step, length=config.data.row_length,
                tokens_per_byte=_tokens_per_byte(rows), schedule=schedule,
                total_steps=total, first_step=first, log_every=config.train.log_every, title=title,
                notes=notes, goodput=clock,
            )  # fmt: skip
        reporter.say(_opening(model, mesh, workdir, first, total, title))
        for line in refused:
            reporter.say(line)
        objective = OBJECTIVES[config.objective.name]
        eval_fn = make_eval_step(objective, config.objective, compiler_options=options)
        key = stream(config.train.seed, "train")
        batches = _batches(config, rows, tokenizer, first, mesh, int(state.guard.offset))
        watch = Watchdog(clock, events, config.train.stall_seconds)
        asked = preemption.Requests(mesh, config.checkpoint.every_minutes)
        prompt = config.train.sample_prompt
        loop = Loop(
            config, saver, reporter, asked, clock, events,
            evaluate=functools.partial(
                _evaluate, eval_fn, config=config, validation=validation, tokenizer=tokenizer, mesh=mesh
            ) if validation else None,
            sample=(lambda model: prompts.complete(model, tokenizer, prompt)) if prompt else None,
        )  # fmt: skip
        with contextlib.closing(reporter), contextlib.closing(watch), contextlib.closing(saver), asked:
            return loop.run(state, step_fn, key, batches, first)


def training_step(config: RunConfig, mesh):
    """(optimizer, jitted step, its compiler options, lines on options left out): what a config means on a mesh.

    ahead/ compiles the same for devices that are not there.
    """
    objective = OBJECTIVES[config.objective.name]
    optax_optimizer = optimizer.make_optimizer(config.optimizer, **_phases(config))
    options, refused = chips.of_mesh(mesh)
    step_fn = make_train_step(
        optax_optimizer, objective, config.objective, microbatches=config.train.microbatches,
        spike_sigma=config.train.spike_sigma, rollback_after=config.train.rollback_after, compiler_options=options,
    )  # fmt: skip
    return optax_optimizer, step_fn, options, refused


def _phases(config: RunConfig) -> dict[str, int]:
    return dict(total_steps=config.train.steps, tokens_per_step=config.train.batch_size * config.data.row_length)


def _start(config: RunConfig, model: ModelConfig, optax_optimizer, saver, mesh, options, clock):
    """State and notes of the newest checkpoint; else a fresh state, with the weights of `init_from` if that is set."""
    init = jax.jit(init_state, static_argnums=(0, 1), compiler_options=options)
    state = init(model, optax_optimizer, stream(config.train.seed, "init"))
    clock.enter("restore")
    newest = saver.newest()
    if newest is not None:
        return saver.restore(newest, state)
    clock.enter("start")
    if config.train.init_from:
        weights = jax.tree.leaves(hf.load(config.train.init_from, "float32", mesh))
        state.trainable = jax.tree.unflatten(jax.tree.structure(state.trainable), weights)
    return state, {}


def _claim(workdir: Path, config: RunConfig, tokenizer: Tokenizer, datasets: list[Path], allow_change: bool) -> None:
    checkpoint.claim_workdir(workdir, config, allow_change=allow_change)
    dataset.require_unchanged(workdir, datasets)
    tokenizer.save(workdir / "tokenizer")
    if config.train.init_from:
        hf.copy_companions(config.train.init_from, workdir / "tokenizer")


def _require_shared(path: Path) -> None:
    """Raises InputError where this process does not see what the first one wrote; NFS may take some seconds."""
    for _ in range(10):
        if path.exists():
            return
        time.sleep(1)
    raise InputError(
        f"process {jax.process_index()} does not see {path}, which process 0 wrote; --workdir must be on a file "
        "system that all hosts share"
    )


@contextlib.contextmanager
def _nothing_left_behind(workdir: Path) -> Iterator[None]:
    """If a run can't begin, removes what was made for it: in the workdir, and the workdir if it was not there."""
    if not processes.is_first():
        yield
        return
    made = [path for path in (workdir / "data", workdir / "tokenizer") if not path.exists()]
    is_new = not workdir.exists()
    try:
        yield
    except BaseException:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        if is_new and workdir.is_dir() and not any(workdir.iterdir()):
            workdir.rmdir()
        raise


def _opening(model: ModelConfig, mesh, workdir: Path, first: int, total: int, title: str) -> str:
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    start = f"from step {first}" if first else "from the start"
    kernel = kernel_for(model.attention_kernel, platform())
    return (
        f"{title}: {parameter_count(model):,} parameters, {total} steps {start}, mesh {sizes}, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, {kernel} attention; workdir {workdir}"
    )


def open_data(config: RunConfig, workdir: Path):
    """(tokenizer, order of training rows, validation rows or None). Files are prepared into workdir/data."""
    data = config.data
    path = Path(data.path) if data.path else workdir / "data"
    weighted = [(path, 1.0), *pipeline.parse_mixture(data.mixture)]
    if not data.path:
        processes.on_first_process(lambda: _prepare(config, workdir, path))
        _require_shared(path)
    opened = [dataset.open_dataset(other) for other, _ in weighted]
    pipeline.require_fields(opened, data.kind)
    tokenizer = load_tokenizer(opened[0].tokenizer_path)
    for source in opened:
        if source.row_length != data.row_length:
            raise InputError(
                f"{source.path}: its rows are {source.row_length} long, config.data.row_length is {data.row_length}"
            )
    if config.train.init_from:
        _same_tokenizer(tokenizer, config.train.init_from, opened[0].path)
    weights = [weight for _, weight in weighted]
    order = pipeline.ordered(opened, weights, config.train.seed, _on_damage(config, workdir))
    held_out = path / "validation"
    validation = dataset.open_dataset(held_out) if (held_out / "manifest.json").exists() else None
    if len(opened[0]) == 0:
        raise InputError(f"{path}: holds no rows; give more text")
    return tokenizer, order, validation


def _on_damage(config: RunConfig, workdir: Path):
    """What the pipeline calls for a damaged row; None: it stops the run."""
    if config.data.on_damage == "stop":
        return None

    def report(position: int, cause: str, action: str) -> None:
        print(f"{cause}; {action}", file=sys.stderr)
        step = position // config.train.batch_size + 1
        Events(workdir).write("damaged row", step=step, cause=cause, action=action)

    return report


def _prepare(config: RunConfig, workdir: Path, path: Path) -> None:
    data = config.data
    prepare.prepare_dataset(
        path, kind=data.kind, files=data.files, tokenizer=_tokenizer(config, workdir), row_length=data.row_length,
        packing=data.packing, documents=data.documents, overlong=data.overlong,
        validation_fraction=data.validation_fraction,
    )  # fmt: skip


def _tokenizer(config: RunConfig, workdir: Path) -> Tokenizer:
    """The one that the config names, that of the model it starts from, or one trained on the files."""
    data = config.data
    if data.tokenizer:
        return load_tokenizer(data.tokenizer)
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


def fit_to_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Fills in what the tokenizer decides (sizes that are 0, special ids) and checks that the rest fits.

    A model that starts from another takes its architecture.
    """
    m = config.model
    if config.train.init_from:
        theirs = dataclasses.asdict(hf.load_config(config.train.init_from, m.dtype))
        own = ("dtype", "residual", "remat", "attention_kernel")  # how it is computed may change from run to run
        m.update({name: value for name, value in theirs.items() if name not in own})
    m.vocab_size = m.vocab_size or tokenizer.vocab_size
    m.embedding_size = m.embedding_size or -(-m.vocab_size // 64) * 64
    m.mask_token_id, m.bos_token_id, m.eos_token_id = tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id
    m.pad_token_id, m.eot_token_id = tokenizer.pad_id, tokenizer.eot_id
    if tokenizer.vocab_size > m.embedding_size:
        raise InputError(
            f"config.model.embedding_size {m.embedding_size} has no row for each of the tokenizer's "
            f"{tokenizer.vocab_size} ids; raise it, or set vocab_size and embedding_size to 0"
        )
    return model_config(m)


def check(config: RunConfig, devices: int) -> None:
    """Raises InputError for a field that is out of its range, for fields that contradict each other, and for a batch
    or mesh that doesn't divide over so many devices. Reads nothing but the config of `init_from`."""
    check_config(config)
    t, d, o, m = config.train, config.data, config.objective, config.model
    if o.name not in OBJECTIVES:
        raise InputError(f"config.objective.name {o.name!r} is not one of {', '.join(OBJECTIVES)}")
    if d.kind not in KINDS:
        raise InputError(f"config.data.kind {d.kind!r} is not one of {', '.join(KINDS)}")
    theirs = hf.load_config(t.init_from, m.dtype) if t.init_from else m
    families.require(theirs.family)
    if d.row_length > theirs.max_sequence_length:
        raise InputError(
            f"config.data.row_length {d.row_length} is longer than the model's context, "
            f"config.model.max_sequence_length {theirs.max_sequence_length}"
        )
    if theirs.causal != OBJECTIVES[o.name].causal:
        raise InputError(
            f"config.objective.name {o.name!r} needs config.model.causal={OBJECTIVES[o.name].causal}: next tokens are "
            "predicted without seeing them, masked ones from both sides"
        )
    if o.name == "sft" and d.kind != "chat":
        raise InputError(f"config.objective.name 'sft' needs config.data.kind 'chat', it is {d.kind!r}")
    optimizer.make_schedule(config.optimizer.schedule, **_phases(config))
    shape = mesh_shape(dict(config.mesh), devices)
    shards = shape["data"] * shape["fsdp"]
    if t.batch_size % (t.microbatches * shards):
        raise InputError(
            f"config.train.batch_size {t.batch_size} does not split into {t.microbatches} microbatches over "
            f"{shards} devices of the data and fsdp axes"
        )
    if o.attention == "full" and (d.random_length_fraction or d.kind == "chat" or d.packing == "document"):
        raise InputError(
            "config.objective.attention 'full' sees padding, which random lengths, chat rows and packing 'document' "
            "make; use 'padding'"
        )
    if d.split_fraction and o.attention != "documents":
        raise InputError("config.data.split_fraction needs config.objective.attention 'documents'")
    if d.tokenizer and d.path:
        raise InputError("config.data.tokenizer and config.data.path: a prepared directory brings its own tokenizer")


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


def _evaluate(eval_fn, model, *, config, validation, tokenizer, mesh) -> dict[str, np.ndarray]:
    """Metrics summed over the first eval_rows validation rows, each under a mask that never changes."""
    tell = lambda _, cause, action: print(f"{cause}; {action}", file=sys.stderr)
    on_damage = tell if config.data.on_damage == "skip" else None
    order = pipeline.ordered([validation], seed=0, on_damage=on_damage)
    size = config.train.batch_size
    batches = pipeline.batches(
        order, batch_size=size, kind=config.data.kind, start_step=0, seed=0, eos_id=tokenizer.eos_id,
        num_steps=max(1, min(config.train.eval_rows, len(validation)) // size),
        only=rows_of_process(mesh, size),
    )  # fmt: skip
    total = None
    for i, batch in enumerate(batches):
        metrics = eval_fn(model, _placed(batch, mesh, size), jax.random.fold_in(stream(0, "eval"), i))
        total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
    assert total is not None
    return jax.device_get(total)


def _tokens_per_byte(order: pipeline.Order) -> float:
    manifests = [source.manifest for source in order.sources]
    return sum(m["tokens"] for m in manifests) / max(sum(m["bytes"] for m in manifests), 1)
