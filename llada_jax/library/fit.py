"""Training from a program: a config, any iterator of texts, dialogues or batches, and functions called on the way.

Nothing is written and nothing is resumed; `run.train` is for runs that must survive.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.config import RunConfig
from llada_jax.data import KINDS
from llada_jax.data.kind import Batch, Place, Plan, Record
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.objectives.elbo import Objective
from llada_jax.parallel.mesh import global_batch, make_mesh, require_divides
from llada_jax.streams import stream
from llada_jax.training.check import check, fit_to_tokenizer
from llada_jax.training.run import training_step
from llada_jax.training.step import init_state

Callback = Callable[[int, Transformer, dict[str, float]], Any]


def fit(
    config: RunConfig, data: Iterable[Any], tokenizer: Tokenizer, *, model: Transformer | None = None,
    objective: Objective | None = None, callbacks: Sequence[Callback] = (),
) -> Transformer:  # fmt: skip
    """Trains for `config.train.steps` steps, or until the data ends; returns the model.

    data: texts, or what else config.data.kind reads (dialogues: lists of messages), packed into rows as they come; or
        batches, dicts of arrays [config.train.batch_size, ...] as the objective reads them.
    model: one to go on with, which is left as it is; by default a new one of config.model, in which what the tokenizer
        decides is filled in. objective: a loss of your own in place of that of config.objective.name.
    callbacks: each called as f(step, model, scalars) after every step, step from 1; scalars has loss, grad_norm and
        elbo_nats_per_token.

    Raises InputError for a config that can't be trained, and for data that does not fit it.
    """
    config = config.copy_and_resolve_references()
    if config.train.init_from or config.lora.rank:
        raise InputError("config.train.init_from and config.lora are for runs with a workdir; give fit a model=")
    if model is not None:
        config.model.update(dataclasses.asdict(model.config))
    check(config, jax.device_count())
    mesh = make_mesh(dict(config.mesh))
    with jax.set_mesh(mesh):
        optax_optimizer, step_fn, options, _ = training_step(config, mesh, objective)
        architecture = fit_to_tokenizer(config, tokenizer) if model is None else model.config
        require_divides(architecture, mesh, config.data.row_length)
        state = jax.jit(init_state, static_argnums=(0, 1), compiler_options=options)(
            architecture, optax_optimizer, stream(config.train.seed, "init")
        )
        if model is not None:
            own = lambda given, like: jax.device_put(jnp.array(given, like.dtype, copy=True), like.sharding)
            state.trainable = jax.tree.map(own, model, state.trainable)
        key, size = stream(config.train.seed, "train"), config.train.batch_size
        for batch in itertools.islice(_batches(config, data, tokenizer), config.train.steps):
            state, metrics = step_fn(state, {name: global_batch(x, mesh, size) for name, x in batch.items()}, key)
            if callbacks:
                step, scalars = int(state.step), _scalars(metrics)
                for callback in callbacks:
                    callback(step, state.model, scalars)
    return state.model


def _scalars(metrics: dict[str, jax.Array]) -> dict[str, float]:
    m = jax.device_get({name: metrics[name] for name in ("loss", "grad_norm", "elbo_sum", "tokens")})
    elbo = float(m["elbo_sum"]) / max(float(m["tokens"]), 1.0)
    return {"loss": float(m["loss"]), "grad_norm": float(m["grad_norm"]), "elbo_nats_per_token": elbo}


def _batches(config: RunConfig, data: Iterable[Any], tokenizer: Tokenizer) -> Iterator[Batch]:
    """Full batches: rows left over at the end are left out."""
    items, size = iter(data), config.train.batch_size
    first = next(items, None)
    if first is None:
        raise InputError("the data is empty")
    items = itertools.chain([first], items)
    if isinstance(first, dict):
        for batch in items:
            if rows := {name: len(x) for name, x in batch.items() if len(x) != size}:
                raise InputError(f"a batch has {rows} rows; config.train.batch_size is {size}")
            yield {name: np.asarray(x) for name, x in batch.items()}
        return
    kind = KINDS[config.data.kind]
    options = {name: config.data[name] for name in kind.options}
    records = _records(config, items, tokenizer)
    for i in itertools.count():
        rows = list(itertools.islice(records, size))
        if len(rows) < size:
            if not i:
                raise InputError(f"the data gives {len(rows)} rows; config.train.batch_size is {size}")
            return
        longest = lambda _, rows=rows: max(int(row["length"]) for row in rows)
        place = Place(np.arange(i * size, (i + 1) * size), longest, config.train.seed, tokenizer.eos_id)
        yield kind.collate(rows, place, **options)


def _records(config: RunConfig, items: Iterable[Any], tokenizer: Tokenizer) -> Iterator[Record]:
    d = config.data
    kind, plan = KINDS[d.kind], Plan(d.kind, d.row_length, d.packing, d.documents, d.overlong, 0.0, 1)
    packer = kind.pack(plan, tokenizer) if kind.pack else None
    for i, item in enumerate(items, start=1):
        for example in kind.encode(item, f"item {i} of the data", tokenizer, plan).examples:
            if packer is None:
                yield example
            else:
                yield from packer.add(example)
    if packer is not None:
        yield from packer.flush()
