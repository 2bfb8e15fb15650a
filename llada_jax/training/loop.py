"""The training loop: steps, what is reported and saved of them, and what makes the run stop or go back.

B rows of an evaluation batch, S tokens of a sample.
"""

import collections
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax import cli
from llada_jax.config import RunConfig
from llada_jax.data import pipeline
from llada_jax.evaluation import reversal
from llada_jax.model import lora
from llada_jax.objectives import OBJECTIVES
from llada_jax.objectives.elbo import Batch
from llada_jax.parallel.mesh import global_batch, of_hosts, rows_of_process
from llada_jax.sampling import prompts
from llada_jax.streams import stream
from llada_jax.training import preemption, stability
from llada_jax.training.checkpoint import Checkpointer
from llada_jax.training.metrics import Reporter
from llada_jax.training.monitor import Events, Goodput
from llada_jax.training.step import TrainState, make_eval_step


@dataclasses.dataclass
class Loop:
    """What a run does besides its steps. evaluate: model -> summed metrics of the validation rows; sample: -> text.

    push: brings what was reported to the bucket that the workdir lies in.
    """

    config: RunConfig
    saver: Checkpointer
    reporter: Reporter
    asked: preemption.Requests
    clock: Goodput
    events: Events
    push: Callable[[], None]
    evaluate: Callable[[Any], dict] | None
    sample: Callable[[Any], str] | None

    def __post_init__(self):
        self._pending = collections.deque()  # steps whose metrics were not fetched yet: (step, metrics, seconds waited)
        self._profiling = False

    def run(self, state: TrainState, step_fn, key: jax.Array, batches: Iterator[Batch], first: int):
        """Steps from `first` + 1 until the batches end; returns the scalars of the last validation.

        Metrics are fetched one step late, so that the device never waits for the host. All that is reported of a step
        is on the disk before its checkpoint: a run that continues from that repeats nothing and misses nothing. Raises
        stability.Diverged when the run must go back, cli.Preempted after SIGTERM or Ctrl-C.
        """
        fields, clock, last, own_seconds, own_steps = self.config.train, self.clock, {}, 0.0, 0
        for step, batch, waited in self._timed(batches, first):
            if self._is_profiled(step) and not self._profiling:
                self._profiling = True
                jax.profiler.start_trace(
                    str(self.reporter.directory)
                )  # into plugins/profile, for TensorBoard and xprof
            start = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_fn(state, batch, key)
            clock.enter("step")
            own_seconds, own_steps = own_seconds + waited + time.perf_counter() - start, own_steps + 1
            if jax.process_count() > 1 and step % fields.log_every == 0:
                metrics["host_seconds"] = of_hosts(own_seconds / own_steps, metrics["loss"].sharding.mesh)
                own_seconds, own_steps = 0.0, 0
            logged = step % fields.log_every == 0 or step == fields.steps
            if self.config.lora.rank and (logged or step == first + 1):  # at the first step it is compiled
                metrics["adapter_mean"], metrics["adapter_max"] = _adapter_size(state.model)
            self._pending.append((step, metrics, waited))
            request = self.asked.poll()
            evaluate = self.evaluate if self._due(step, fields.eval_every) else None
            sample = self.sample if self._due(step, fields.sample_every) else None
            saving = self.saver.due(step) or step == fields.steps or request != preemption.NOTHING
            profiled = self._profiling and not self._is_profiled(step + 1)
            self._fetch(late=0 if evaluate or sample or saving or profiled or step == first + 1 else 1)
            if step == first + 1:
                own_seconds, own_steps = 0.0, 0  # it was compiled: that says nothing of the steps to come
            if profiled:
                self._profiling = False
                jax.profiler.stop_trace()
            with self.reporter.not_counted():
                if evaluate:
                    clock.enter("evaluate")
                    last = self.reporter.evaluation(step, evaluate(state.model))
                if sample:
                    clock.enter("sample")
                    self.reporter.text(step, "sample", sample(state.model))
                if saving:
                    clock.enter("save")
                    self.saver.save(step, state, self.reporter.notes(), before=self._before_save)
                    self.asked.saved()
            if request > preemption.SAVE and step < fields.steps:
                self.saver.finish()
                number = signal.Signals(request)
                self.events.write("preemption", step=step, cause=cli.SIGNALS[number], action="saved and stopped")
                raise cli.Preempted(step, number)
        clock.enter("save")
        self.saver.finish()
        return last

    def _before_save(self) -> None:
        self.reporter.flush()
        self.push()

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
        """Reports all steps but the last `late`."""
        while len(self._pending) > late:
            step, metrics, waited = self._pending.popleft()
            metrics = jax.device_get(metrics)
            self.reporter.step(step, metrics, waited)
            try:
                stability.report(step, metrics, self.config.train, self.events, self.reporter.say)
            except stability.Diverged:
                self.saver.wait()
                raise

    def _is_profiled(self, step: int) -> bool:
        first, last = self.config.train.profile_steps or (0, -1)
        return first <= step <= min(last, self.config.train.steps) and jax.process_index() == 0

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.train.steps)


_adapter_size = jax.jit(lora.relative_size)


def evaluator(
    config: RunConfig, validation: pipeline.RowSource, tokenizer, mesh, compiler_options: dict | None
) -> Callable[[Any], dict[str, np.ndarray]]:  # fmt: skip
    """model -> metrics summed over `eval_rows` validation rows, each under a mask that never changes.

    Fewer than a batch are repeated under other masks, at most to a batch.
    """
    t = config.train
    rows = min(t.eval_rows, max(len(validation), t.batch_size))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(rows, t.batch_size) // shards) * shards
    # A forward pass alone keeps nothing for a backward pass: twice the rows of a microbatch fit.
    microbatches = next(
        n for n in range(1, size + 1) if size % (n * shards) == 0 and size // n <= _most_rows(t, shards)
    )
    objective = OBJECTIVES[config.objective.name]
    eval_fn = make_eval_step(objective, config.objective, microbatches=microbatches, compiler_options=compiler_options)
    told = lambda _, cause, action: print(f"{cause}; {action}", file=sys.stderr)
    order = pipeline.ordered([validation], seed=0, on_damage=told if config.data.on_damage == "skip" else None)
    own = rows_of_process(mesh, size)

    def evaluate(model) -> dict[str, np.ndarray]:
        batches = pipeline.batches(
            order, batch_size=size, kind=config.data.kind, start_step=0, seed=0, eos_id=tokenizer.eos_id,
            num_steps=-(-rows // size), only=own,
        )  # fmt: skip
        total = None
        for i, batch in enumerate(batches):
            surplus_B = i * size + own >= rows  # of the last batch: not asked for
            if surplus_B.any():
                batch["maskable"] = batch["maskable"] & ~surplus_B[:, None]
            placed = {name: global_batch(x, mesh, size) for name, x in batch.items()}
            metrics = eval_fn(model, placed, jax.random.fold_in(stream(0, "eval"), i))
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
        return jax.device_get(total)

    return evaluate


def _most_rows(train, shards: int) -> int:
    """Rows that are evaluated at once."""
    return max(2 * train.batch_size // train.microbatches, shards)


def sampler(config: RunConfig, tokenizer) -> Callable[[Any], str]:
    """model -> what it makes of `sample_prompt`, in the way that it was trained: left to right, or as a reply."""
    prompt = config.train.sample_prompt
    if OBJECTIVES[config.objective.name].causal:
        return lambda model: prompt + reversal.continue_text(model, tokenizer, [prompt], 32)[0]
    if config.data.kind == "chat":
        return functools.partial(prompts.reply, tokenizer=tokenizer, message=prompt)
    return functools.partial(prompts.complete, tokenizer=tokenizer, prompt=prompt)
