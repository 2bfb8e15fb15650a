"""TrainState and the one compiled step, for every objective.

A microbatches, B rows of the global batch, L length.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from llada_jax.model.config import ModelConfig
from llada_jax.model.transformer import Transformer
from llada_jax.objectives.elbo import Batch, noisy_loss
from llada_jax.parallel.mesh import BATCH, current_mesh
from llada_jax.training import stability
from llada_jax.training.optimizer import keep


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a run must not lose. The next batch is number step + guard.offset, a function of (seed, number)."""

    step: jax.Array  # int32 []
    model: Any  # Transformer, float32 masters (Any: optax's types know no modules)
    opt_state: Any
    guard: stability.Guard


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state. Under jit with a mesh set every array, Adam's moments too, is born sharded."""
    model: Any = Transformer(config, key)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer.init(model), stability.fresh_guard())


def make_train_step(
    optimizer: optax.GradientTransformationExtraArgs, objective, objective_config, *, microbatches: int = 1,
    spike_sigma: float = 0.0, rollback_after: int = 0, compiler_options: dict | None = None,
):  # fmt: skip
    """(state, batch, key) -> (state, metrics), jitted, the state donated.

    `key` is the run's: the step's own is fold_in(key, number of the batch). Metrics are sums and scalars;
    metrics.Reporter reads them. An update that stability.judge finds harmful is not made: then all but `step` and
    `guard` keeps its bits. `compiler_options`: those of the chip, see compiler_options.py.
    """

    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        key = jax.random.fold_in(key, state.step + state.guard.offset)
        noisy = objective(batch, key, state.model.config, objective_config)
        value_and_grad = jax.value_and_grad(noisy_loss, has_aux=True)
        if microbatches == 1:
            (loss, sums), grads = value_and_grad(state.model, noisy)
        else:

            def accumulate(total, part):
                return jax.tree.map(jnp.add, total, value_and_grad(state.model, part)), None

            parts = jax.tree.map(functools.partial(_microbatches, count=microbatches), noisy)
            scalars, _ = jax.eval_shape(value_and_grad, state.model, jax.tree.map(lambda x: x[0], parts))
            zeros = (
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), scalars),
                jax.tree.map(jnp.zeros_like, state.model),
            )
            ((loss, sums), grads), _ = jax.lax.scan(accumulate, zeros, parts)
        norm = optax.tree.norm(grads)
        cause, guard = stability.judge(state.guard, loss, norm, spike_sigma=spike_sigma, rollback_after=rollback_after)
        ok = cause == 0
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model, ok=ok)
        model = optax.apply_updates(state.model, jax.tree.map(lambda u: guard.rate * u, updates))
        model = keep(ok, model, state.model)
        metrics = {"loss": loss, "grad_norm": norm, "tokens": jnp.sum(batch.maskable), **sums}
        metrics |= {"cause": cause, "streak": guard.streak, "skipped": guard.skipped}
        metrics |= {"offset": guard.offset, "rate": guard.rate}
        if batch.replaced is not None:
            metrics["replaced_rows"] = jnp.sum(batch.replaced)
        return TrainState(state.step + 1, model, opt_state, guard), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def make_eval_step(objective, objective_config, *, compiler_options: dict | None = None):
    """(model, batch, key) -> metrics, jitted. The same key gives the same masks: fixed ones for validation."""

    def eval_step(model: Transformer, batch: Batch, key: jax.Array):
        loss, sums = noisy_loss(model, objective(batch, key, model.config, objective_config))
        return {"loss": loss, "tokens": jnp.sum(batch.maskable), **sums}

    return jax.jit(eval_step, compiler_options=compiler_options)


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [A, B/A, ...]: part a holds rows a, a + A, …, so that each device keeps its own rows."""
    rest = x.shape[1:]
    sharding = None
    if current_mesh() is not None:
        axes = jax.typeof(x).sharding.spec
        sharding = P(BATCH, None, *axes[1:])
    split = jnp.reshape(x, (len(x) // count, count, *rest), out_sharding=sharding)
    return jnp.swapaxes(split, 0, 1)
