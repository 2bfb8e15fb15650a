"""The training loop: steps, what is told and saved of them, and what makes the run stop or go back."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llada_jax import cli
from llada_jax.config import RunConfig
from llada_jax.objectives.elbo import Batch
from llada_jax.parallel.mesh import of_hosts
from llada_jax.training import preemption, stability
from llada_jax.training.checkpoint import Checkpointer
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events, Goodput
from llada_jax.training.step import TrainState


@dataclasses.dataclass
class Loop:
    """What a run does besides its steps. evaluate: model -> summed metrics of the validation rows; sample: -> text."""

    config: RunConfig
    saver: Checkpointer
    reporter: Reporter
    asked: preemption.Requests
    clock: Goodput
    events: Events
    evaluate: Callable[[Any], dict] | None
    sample: Callable[[Any], str] | None

    def __post_init__(self):
        self._pending = collections.deque()  # steps whose metrics were not fetched yet: (step, metrics, seconds waited)

    def run(self, state: TrainState, step_fn, key: jax.Array, batches: Iterator[Batch], first: int):
        """Steps from `first` + 1 until the batches end; returns the scalars of the last validation.

        Metrics are fetched one step late, so that the device never waits for the host. All that is told of a step is
        on the disk before its checkpoint: a run that continues from that repeats nothing and misses nothing. Raises
        stability.Diverged when the run must go back, cli.Preempted after a SIGTERM.
        """
        fields, clock, last, own_seconds = self.config.train, self.clock, {}, 0.0
        for step, batch, waited in self._timed(batches, first):
            start = time.perf_counter()
            state, metrics = step_fn(state, batch, key)
            clock.enter("step")
            own_seconds += waited + time.perf_counter() - start
            if jax.process_count() > 1 and step % fields.log_every == 0:
                metrics["host_seconds"] = of_hosts(own_seconds, metrics["loss"].sharding.mesh)
                own_seconds = 0.0
            self._pending.append((step, metrics, waited))
            request = self.asked.poll()
            evaluate = self.evaluate if self._due(step, fields.eval_every) else None
            sample = self.sample if self._due(step, fields.sample_every) else None
            saving = self.saver.due(step) or step == fields.steps or request != preemption.NOTHING
            self._fetch(late=0 if evaluate or sample or saving else 1)
            if evaluate:
                clock.enter("evaluate")
                last = self.reporter.evaluation(step, evaluate(state.model))
                self.reporter.restart_clock()
            if sample:
                clock.enter("sample")
                self.reporter.text(step, "sample", sample(state.model))
                self.reporter.restart_clock()
            if saving:
                clock.enter("save")
                self.saver.save(step, state, self.reporter.notes(), first=self.reporter.flush)
                self.asked.saved()
            if request == preemption.STOP and step < fields.steps:
                self.saver.finish()
                self.events.write("preemption", step=step, cause="SIGTERM", action="saved and stopped")
                raise cli.Preempted(step)
        clock.enter("save")
        self.saver.finish()
        return last

    def _timed(self, batches: Iterator[Batch], first: int) -> Iterator[tuple[int, Batch, float]]:
        """(number of the step, its batch, seconds that the loop waited for it)."""
        step = first
        while True:
            self.clock.enter("data", hidden=self._device_is_busy())
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            step += 1
            phase = "compile" if step == first + 1 else "step"
            self.clock.enter(phase, step=step, hidden=self._device_is_busy())
            yield step, batch, time.perf_counter() - start

    def _device_is_busy(self) -> bool:
        """Then what the host does takes no time from the run."""
        return bool(self._pending) and not self._pending[-1][1]["loss"].is_ready()

    def _fetch(self, late: int) -> None:
        """Tells of all steps but the last `late`."""
        while len(self._pending) > late:
            step, metrics, waited = self._pending.popleft()
            metrics = jax.device_get(metrics)
            self.reporter.step(step, metrics, waited)
            try:
                stability.report(step, metrics, self.config.train, self.events, self.reporter.say)
            except stability.Diverged:
                self.saver.wait()
                raise

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.train.steps)
