"""TrainState and the one compiled step, for every objective.

A microbatches, B rows of the global batch, L length.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from llada_jax.config import Lora
from llada_jax.model import lora
from llada_jax.model.config import ModelConfig
from llada_jax.model.transformer import Transformer
from llada_jax.objectives.elbo import Batch, NoisyBatch, Objective, row_elbos, weighted_loss
from llada_jax.parallel.mesh import BATCH, current_mesh, reshard
from llada_jax.training import stability
from llada_jax.training.optimizer import keep

_DROPOUT = 0xD209  # folded into the key of a step, from which `corrupt` draws its masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a run must not lose. The next batch is number step + guard.offset, a function of (seed, number)."""

    step: jax.Array  # int32 []
    trainable: Any  # what the optimizer changes: the model, with None in the place of frozen parameters
    frozen: Any  # the model with None in the place of trainable parameters; None: nothing is frozen
    opt_state: Any  # of `trainable` alone
    guard: stability.AnomalyState

    @property
    def model(self) -> Transformer:
        return merge(self.trainable, self.frozen)


def split(model: Any, is_trainable: Callable[[str], bool]) -> tuple[Any, Any]:
    """(trainable, frozen) of a model, by the name of each parameter, such as "blocks.q_proj"."""

    def part(wanted: bool):
        def leaf(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            return x if is_trainable(name) == wanted else None

        return jax.tree_util.tree_map_with_path(leaf, model)

    return part(True), part(False)


def merge(trainable: Any, frozen: Any) -> Transformer:
    """The model of `split`'s two parts; gradients reach the first alone."""
    if frozen is None:
        return trainable
    return jax.tree.map(lambda t, f: f if t is None else t, trainable, frozen, is_leaf=lambda x: x is None)


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state. Under jit with a mesh set every array, Adam's moments too, is born sharded."""
    model: Any = Transformer(config, key)
    return TrainState(jnp.zeros((), jnp.int32), model, None, optimizer.init(model), stability.fresh_state())


def adapted_state(base: Transformer, c: Lora, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state in which adapters of `base` are all that is trained; see model/lora.py. Nothing of it is copied."""
    made = jax.jit(lambda key: lora.adapters_of(lora.attach(base, c, key)))(key)
    trainable, frozen = split(lora.with_adapters(base, made), lora.is_trainable)
    rest = jax.jit(lambda x: (jnp.zeros((), jnp.int32), optimizer.init(x), stability.fresh_state()))
    step, opt_state, guard = rest(trainable)
    return TrainState(step, trainable, frozen, opt_state, guard)


def make_train_step(
    optimizer: optax.GradientTransformationExtraArgs, objective: Objective, objective_config, *, microbatches: int = 1,
    spike_sigma: float = 0.0, rollback_after: int = 0, compiler_options: dict | None = None,
):  # fmt: skip
    """(state, batch, key) -> (state, metrics), jitted, the state donated.

    `key` is the run's: the step's own is fold_in(key, number of the batch). Metrics are sums and scalars;
    metrics.Reporter reads them. An update that stability.should_skip finds harmful is not made: then all but `step` and
    `guard` keeps its bits. `compiler_options`: those of the chip, see parallel/chips.py.

    Where the loss is not a sum over rows (`objective.combine`), a first pass without gradient finds the row ELBOs, and
    the gradient of `combine` in them multiplies the weights of the usual pass: exact by the chain rule, in microbatches
    too, and nothing of the first pass is kept for the second but one number a row.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step + state.guard.offset)
        noisy = objective.corrupt(batch, key, state.model.config, objective_config)
        extras, noisy = noisy.extras, dataclasses.replace(noisy, extras={})
        combined = None
        if objective.combine is not None:
            elbos_B = _over_microbatches(row_elbos, state.model, noisy, microbatches, key)
            combined, slope_B = jax.value_and_grad(objective.combine, has_aux=True)(elbos_B, extras)
            noisy = dataclasses.replace(noisy, weights=-slope_B[:, None] * noisy.weights)
        (loss, sums), grads = _gradients(state.trainable, state.frozen, noisy, microbatches, key)
        if combined is not None:
            loss, sums = combined[0], sums | combined[1]
        norm = optax.tree.norm(grads)
        cause, guard = stability.should_skip(
            state.guard, loss, norm, spike_sigma=spike_sigma, rollback_after=rollback_after
        )
        ok = cause == 0
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, ok=ok)
        trainable = optax.apply_updates(state.trainable, jax.tree.map(lambda u: guard.rate * u, updates))
        trainable = keep(ok, trainable, state.trainable)
        metrics = {"loss": loss, "grad_norm": norm, "tokens": jnp.sum(batch["maskable"]), **sums}
        metrics |= {"cause": cause, "streak": guard.streak, "skipped": guard.skipped}
        metrics |= {"offset": guard.offset, "rate": guard.rate}
        if "replaced" in batch:
            metrics["replaced_rows"] = jnp.sum(batch["replaced"])
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, guard), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def make_eval_step(
    objective: Objective, objective_config, *, microbatches: int = 1, compiler_options: dict | None = None
):  # fmt: skip
    """(model, batch, key) -> metrics, jitted. The same key gives the same masks: fixed ones for validation.

    They are not dealt for balance, which would make them depend on how many rows fill up the batch on a mesh.
    """
    objective_config = ConfigDict({**objective_config, "balanced": False})

    def eval_step(model: Transformer, batch: Batch, key: jax.Array):
        noisy = objective.corrupt(batch, key, model.config, objective_config)
        extras, noisy = noisy.extras, dataclasses.replace(noisy, extras={})
        if microbatches == 1:
            loss, sums = weighted_loss(model, noisy)
        else:
            parts = jax.tree.map(functools.partial(_microbatches, count=microbatches), noisy)
            found = jax.lax.map(functools.partial(weighted_loss, model), parts)
            loss, sums = jax.tree.map(functools.partial(jnp.sum, axis=0), found)
        if objective.combine is not None:
            loss, more = objective.combine(_over_microbatches(row_elbos, model, noisy, microbatches), extras)
            sums |= more
        return {"loss": loss, "tokens": jnp.sum(batch["maskable"]), **sums}

    return jax.jit(eval_step, compiler_options=compiler_options)


def _gradients(trainable, frozen, noisy: NoisyBatch, microbatches: int, key: jax.Array):
    """((loss, sums), gradients) of the weighted loss in `trainable`, accumulated over the microbatches."""

    def loss_of(trainable, part, i):
        return weighted_loss(_dropping(merge(trainable, frozen), key, i), part)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if microbatches == 1:
        return value_and_grad(trainable, noisy, 0)
    noisy = _by_ratio(noisy)

    def accumulate(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(trainable, *part)), None

    parts = jax.tree.map(functools.partial(_microbatches, count=microbatches), noisy), jnp.arange(microbatches)
    scalars, _ = jax.eval_shape(value_and_grad, trainable, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), scalars), jax.tree.map(jnp.zeros_like, trainable)
    return jax.lax.scan(accumulate, zeros, parts)[0]


def _by_ratio(noisy: NoisyBatch) -> NoisyBatch:
    """Each device's rows in the order of their mask ratios: then a microbatch asks about as many positions of every
    device, none of which has to wait for the one with most."""
    mesh = current_mesh()
    if mesh is None or math.prod(mesh.shape[axis] for axis in BATCH) == 1:
        return noisy
    noisy = jax.tree.map(lambda x: reshard(x, BATCH, *jax.typeof(x).sharding.spec[1:]), noisy)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, noisy)

    def ordered(noisy: NoisyBatch) -> NoisyBatch:
        order = jnp.argsort(noisy.ratio)
        return jax.tree.map(lambda x: x[order], noisy)

    return jax.shard_map(ordered, in_specs=(specs,), out_specs=specs)(noisy)


def _dropping(model: Transformer, key: jax.Array, microbatch) -> Transformer:
    """The model with the dropout of a microbatch, the same in every pass over it; `key` is that of the step."""
    return lora.dropping(model, jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), microbatch))


def _over_microbatches(function, model, noisy: NoisyBatch, microbatches: int, key: jax.Array | None = None):
    """function(model, rows) -> [rows], for a microbatch at a time; [B] in the order of the batch. key: for dropout."""
    of_part = lambda part, i: function(model if key is None else _dropping(model, key, i), part)
    if microbatches == 1:
        return of_part(noisy, 0)
    parts = jax.tree.map(functools.partial(_microbatches, count=microbatches), noisy)
    found_AB = jax.lax.map(lambda part: of_part(*part), (parts, jnp.arange(microbatches)))
    return jnp.reshape(jnp.swapaxes(found_AB, 0, 1), -1, out_sharding=_rows_spec())


def _rows_spec():
    return None if current_mesh() is None else P(BATCH)


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [A, B/A, ...]: part a holds rows a, a + A, …, so that each device keeps its own rows."""
    rest = x.shape[1:]
    sharding = None
    if current_mesh() is not None:
        axes = jax.typeof(x).sharding.spec
        sharding = P(BATCH, None, *axes[1:])
    split = jnp.reshape(x, (len(x) // count, count, *rest), out_sharding=sharding)
    return jnp.swapaxes(split, 0, 1)
