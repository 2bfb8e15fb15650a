"""Numbers going wrong: harmful updates are skipped inside the step; after too many in a row the run goes back.

A rollback is a restart from an older checkpoint that reads other batches: `AnomalyState.offset` moves the data, and the
masks with it, past those of the failure. W updates of the window.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.fields import InputError, RunFailed
from llada_jax.files import read_text, write_atomic
from llada_jax.training.monitor import Events

WINDOW = 128  # updates, with whose loss and gradient norm those of a new one are compared
ROLLBACKS = 3  # to one place; then the run gives up

_LOSS, _NORM, _LOSS_SPIKE, _NORM_SPIKE, _WAITING = range(1, 6)  # causes; 0: the update was made


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class AnomalyState:
    """What decides on an update, and what rollbacks left: part of the state, so that a resumed run decides alike."""

    recent: jax.Array  # float32 [2, W]; losses and gradient norms of the last updates that were made
    made: jax.Array  # int32 []; updates
    skipped: jax.Array  # int32 []; updates
    streak: jax.Array  # int32 []; updates skipped in a row
    offset: jax.Array  # int32 []; the batch of step k is number k + offset
    rate: jax.Array  # float32 []; factor of the learning rate


class Diverged(Exception):
    """So many updates in a row were skipped, the last of them in `step`, that the run must go back."""

    def __init__(self, step: int, offset: int, rate: float, cause: str):
        super().__init__(cause)
        self.step, self.offset, self.rate, self.cause = step, offset, rate, cause


def fresh_state() -> AnomalyState:
    zero = lambda: jnp.zeros((), jnp.int32)
    return AnomalyState(jnp.zeros((2, WINDOW), jnp.float32), zero(), zero(), zero(), zero(), jnp.ones((), jnp.float32))


def should_skip(
    guard: AnomalyState, loss, norm, *, spike_sigma: float, rollback_after: int
) -> tuple[jax.Array, AnomalyState]:
    """(0 if the update is to be made, else the cause, int32 []; the guard after it).

    loss, norm: float32 [], of the whole batch and of all gradients, so that every host decides alike. After
    `rollback_after` updates in a row every one is skipped, so that a run that is killed before it goes back still will.
    """
    now = jnp.stack([loss, norm])
    infinite, limit = ~jnp.isfinite(now), jnp.mean(guard.recent, 1) + spike_sigma * jnp.std(guard.recent, 1)
    spiked = (now > limit) & (guard.made >= WINDOW) & (spike_sigma > 0)
    waiting = (guard.streak >= rollback_after) & (rollback_after > 0)
    wrong = [waiting, infinite[0], infinite[1], spiked[0], spiked[1]]
    cause = jnp.select(wrong, list(map(jnp.int32, (_WAITING, _LOSS, _NORM, _LOSS_SPIKE, _NORM_SPIKE))), jnp.int32(0))
    ok = cause == 0
    place = ok & (jnp.arange(WINDOW) == guard.made % WINDOW)
    return cause, dataclasses.replace(
        guard,
        recent=jnp.where(place, now[:, None], guard.recent),
        made=guard.made + ok,
        skipped=guard.skipped + ~ok,
        streak=jnp.where(ok, 0, guard.streak + 1),
    )


def report(step: int, metrics: dict[str, Any], fields, events: Events, say) -> None:
    """Reports an update that was skipped. `metrics`: of `step`, on the host; `fields`: config.train.

    Raises Diverged when the run must go back.
    """
    number, streak = int(metrics["cause"]), int(metrics["streak"])
    if not number:
        return
    loss, norm = f"loss {float(metrics['loss']):.4g}", f"gradient norm {float(metrics['grad_norm']):.4g}"
    spike = f"is over {fields.spike_sigma:g} sigma above the mean of the last {WINDOW} updates"
    cause = {
        _LOSS: f"{loss} is not finite",
        _NORM: f"{norm} is not finite",
        _LOSS_SPIKE: f"{loss} {spike}",
        _NORM_SPIKE: f"{norm} {spike}",
        _WAITING: f"{streak} updates in a row were skipped",
    }[number]
    action = f"update skipped, {streak} in a row, {int(metrics['skipped'])} in all"
    events.write("skipped update", step=step, cause=cause, action=action)
    if streak == 1:
        say(f"step {step}: {cause}; {action}")
    if fields.rollback_after and streak >= fields.rollback_after:
        failed = step - (streak - fields.rollback_after)  # the same step for a run that was killed after it
        raise Diverged(failed, int(metrics["offset"]), float(metrics["rate"]), cause)


def record_rollback(workdir: str | Path, failure: Diverged, place: int, fields) -> str:
    """Makes the next start at step `place`, the newest checkpoint, read other batches; says so. `fields`: config.train.

    Raises RunFailed where the run has gone back to this place too often. For one process alone.
    """
    done, events = _rollbacks(workdir), Events(workdir)
    tried = sum(one["step"] == place for one in done)
    if tried >= ROLLBACKS:
        action = f"gave up: {tried} rollbacks to step {place} did not help"
        events.write("diverged", step=failure.step, cause=failure.cause, action=action)
        raise RunFailed(
            f"{workdir}: step {failure.step}: {failure.cause}; {action}. Lower the learning rate or "
            "config.train.rollback_rate, or look at the data and at events.jsonl"
        )
    offset, rate = failure.step + failure.offset - place, failure.rate * fields.rollback_rate
    done.append({"step": place, "failed": failure.step, "offset": offset, "rate": rate})
    write_atomic(Path(workdir) / "rollbacks.json", json.dumps(done, indent=1))
    action = f"rolled back to step {place}; it goes on with batch {place + offset}"
    action += f" and {rate:g} of the learning rate" if rate != 1 else ""
    events.write("diverged", step=failure.step, cause=failure.cause, action=action)
    return f"step {failure.step}: {failure.cause}; {action}"


def rollback_to(workdir: str | Path, step: int) -> dict[str, Any] | None:
    """The last rollback to that step, as `record_rollback` keeps it."""
    return next((one for one in reversed(_rollbacks(workdir)) if one["step"] == step), None)


def resumed(guard: AnomalyState, rollback: dict[str, Any] | None) -> AnomalyState:
    """The guard of a checkpoint after a rollback to it."""
    if rollback is None:
        return guard
    put = lambda x, like: jax.make_array_from_callback((), like.sharding, lambda _: np.asarray(x, like.dtype))
    offset, rate = put(rollback["offset"], guard.offset), put(rollback["rate"], guard.rate)
    return dataclasses.replace(guard, streak=put(0, guard.streak), offset=offset, rate=rate)


def _rollbacks(workdir: str | Path) -> list[dict[str, Any]]:
    path = Path(workdir) / "rollbacks.json"
    if not path.exists():
        return []
    try:
        done = json.loads(read_text(path))
        return [{name: one[name] for name in ("step", "failed", "offset", "rate")} for one in done]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error!r}); copy it again, or the run repeats what failed") from error
