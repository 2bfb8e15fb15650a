"""What a run reports: the ELBO (smooth and raw), throughput, MFU; to TensorBoard, metrics.jsonl and the terminal."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from llada_jax.model.config import ModelConfig
from llada_jax.objectives.elbo import BUCKETS
from llada_jax.parallel import chips
from llada_jax.training.monitor import Events, Goodput
from llada_jax.training.writer import Board, Lines

_PLAIN_SECONDS = 10.0  # between lines where there is no terminal

_ABOUT = """The ELBO weights a row by 1/p, so a row with few masks has a large weight and `elbo` is a noisy curve. The
smooth one holds the same quantity: cross-entropy at masked positions, averaged within ten ranges of the mask ratio
over the recent steps, then over the ranges, since the ELBO is the integral of that cross-entropy over the ratio."""


def flops_per_step(c: ModelConfig, rows: int, length: int, scored: float, frozen: bool = False) -> float:
    """Model FLOPs of one training step: 6 per weight and token, and 12·layers·d·L per token for attention.

    A frozen weight takes 4: it has no gradient of its own. Adapters are not counted.

    Bidirectional attention is counted in full, causal attention by half. The vocabulary matrix is counted at the
    `scored` positions of the step only, since no other position asks for it. Recomputation is not counted.
    """
    attention = 2 * c.d_model * c.n_heads * c.head_dim + 2 * c.d_model * c.n_kv_heads * c.head_dim
    weight = 4 if frozen else 6
    per_token = weight * c.n_layers * (attention + 3 * c.d_model * c.mlp_hidden_size)
    per_token += 12 * c.n_layers * c.d_model * length * (0.5 if c.causal else 1.0)
    return rows * length * per_token + weight * scored * c.d_model * c.embedding_size


class SmoothElbo:
    """Cross-entropy by mask ratio with exponentially fading sums, and its mean over the ratio: the ELBO, smooth."""

    def __init__(self, fade: float = 0.99, sums=((0.0,) * BUCKETS,) * 2):
        self._fade = fade
        self._sum, self._count = map(np.asarray, sums)

    @property
    def sums(self) -> list[list[float]]:
        """What a new one continues from."""
        return [self._sum.tolist(), self._count.tolist()]

    def add(self, ce_sum: np.ndarray, ce_count: np.ndarray) -> None:
        self._sum = self._fade * self._sum + ce_sum
        self._count = self._fade * self._count + ce_count

    def by_ratio(self) -> np.ndarray:
        """Nats per masked token in each range of the ratio, NaN where nothing was seen."""
        with np.errstate(invalid="ignore"):
            return self._sum / self._count

    def nats_per_token(self) -> float:
        means = self.by_ratio()
        return float(np.nanmean(means)) if np.isfinite(means).any() else math.nan


class Reporter:
    """Turns device metrics into scalars and writes them; only process 0 writes."""

    def __init__(
        self, workdir: str | Path, c: ModelConfig, *, rows: int, length: int, tokens_per_byte: float | None, schedule,
        total_steps: int, first_step: int, log_every: int, title: str, notes: dict[str, Any], goodput: Goodput,
        events: Events, frozen: bool = False,
    ):  # fmt: skip
        self.directory = Path(workdir)
        self._c, self._rows, self._length, self._tokens_per_byte = c, rows, length, tokens_per_byte
        self._schedule, self._total, self._log_every, self._title = schedule, total_steps, log_every, title
        self._smooth = SmoothElbo(sums=notes["smooth_elbo"]) if notes else SmoothElbo()
        self._frozen = frozen
        self._goodput, self._events, self._replaced_rows = goodput, events, 0.0
        self._what = "ce" if c.causal else "elbo"  # of the control it is no bound
        self._writes = jax.process_index() == 0
        self._first_step = first_step + 1  # which is compiled: its time says nothing of the others
        self.restart_clock()
        if self._writes:
            self._board = Board(self.directory, first_step)
            self._board.add_text("about_the_curves", _ABOUT, first_step)
            self._lines = Lines(self.directory / "metrics.jsonl", first_step)
            terminal = sys.stderr.isatty()
            self._bar = tqdm(total=total_steps, initial=first_step, desc=title, unit="step", disable=not terminal)
            self._plain, self._last_line = not terminal, time.perf_counter()

    def step(self, step: int, metrics: dict, data_seconds: float) -> None:
        """Takes one step's metrics (arrays of a finished step) and writes at every log_every-th."""
        m = {name: np.asarray(value, np.float64) for name, value in jax.device_get(metrics).items()}
        if np.isfinite(m["ce_sum"]).all():
            self._smooth.add(m["ce_sum"], m["ce_count"])
        self._steps += 1
        self._tokens += float(m["tokens"])
        self._flops += flops_per_step(self._c, self._rows, self._length, float(m["ce_count"].sum()), self._frozen)
        self._data_seconds += data_seconds
        if step == self._first_step:
            self.restart_clock()
        self._replaced_rows += float(m.get("replaced_rows", 0.0))
        if self._writes:
            self._bar.update(1)
        if step % self._log_every and step != self._total:
            return
        scalars = self._losses(m) | self._optimizer(step, m) | self._goodput.scalars()
        if self._steps:
            scalars |= self._speed(m)
        if "replaced_rows" in m:
            scalars["5_data/replaced_rows"], self._replaced_rows = self._replaced_rows, 0.0  # since the last line
        self.restart_clock()
        self.write(step, scalars)
        self._show(step, scalars)

    def _losses(self, m: dict[str, np.ndarray]) -> dict[str, float]:
        smooth = f"1_loss/smooth_{self._what}_nats_per_token"
        scalars = {smooth: self._smooth.nats_per_token(), "1_loss/loss": float(m["loss"])}
        scalars |= self._per_token("1_loss", m)
        for i, nats in enumerate(self._smooth.by_ratio()):
            if np.isfinite(nats) and not self._c.causal:
                scalars[f"2_ce_by_mask_ratio/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}"] = float(nats)
        return scalars

    def _optimizer(self, step: int, m: dict[str, np.ndarray]) -> dict[str, float]:
        made = step - 1 - int(m["skipped"])  # updates before this one
        scalars = {
            "3_optimizer/grad_norm": float(m["grad_norm"]),
            "3_optimizer/learning_rate": float(self._schedule(made) * m["rate"]),
            "3_optimizer/skipped_updates": float(m["skipped"]),
        }
        sizes = {name: float(m[name]) for name in ("adapter_mean", "adapter_max") if name in m}
        return scalars | {f"3_optimizer/{name}_over_weight": size for name, size in sizes.items()}

    def _speed(self, m: dict[str, np.ndarray]) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._since, 1e-9)
        scalars = {
            "4_speed/tokens_per_second": self._tokens / seconds,
            "4_speed/data_wait_share": self._data_seconds / seconds,
            "4_speed/seconds_per_step": seconds / self._steps,
        }
        if "host_seconds" in m:  # of each device, those of a step on its host
            slowest, mean = float(m["host_seconds"].max()), float(m["host_seconds"].mean())
            scalars["4_speed/slowest_host_over_mean"] = slowest / mean
            scalars["4_speed/slowest_host_seconds_per_step"] = slowest
        if peak := chips.peak_flops(jax.devices()[0].device_kind):
            scalars["4_speed/mfu"] = self._flops / seconds / (peak * jax.device_count())
        return scalars

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """To TensorBoard and metrics.jsonl."""
        if not self._writes:
            return
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._lines.write({"step": step, **{k: _number(v) for k, v in scalars.items()}})

    def notes(self) -> dict:
        """What a checkpoint keeps, so that the numbers of a run that continues from it are the same."""
        return {"smooth_elbo": self._smooth.sums}

    def flush(self) -> None:
        """Returns when all that was reported is on the disk. Raises OSError if it is full."""
        if self._writes:
            self._board.flush()
            self._lines.flush()

    def evaluation(self, step: int, metrics: dict) -> dict[str, float]:
        """Writes the validation loss from summed metrics, and says where it is not finite; returns the scalars."""
        m = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        scalars = self._per_token("0_validation", m)
        self.write(step, scalars)
        self.say(f"{self._title}: step {step} validation " + _short(scalars))
        if not all(map(math.isfinite, scalars.values())):
            cause = f"the validation loss of step {step} is not finite"
            self.say(f"{self._title}: {cause}: parameters or activations have overflowed")
            self._events.write("not finite", step=step, cause=cause, action="the run goes on")
        return scalars

    def text(self, step: int, name: str, text: str) -> None:
        if self._writes:
            self._board.add_text(name, text, step)
            self.say(f"{self._title}: step {step} {name}: {text}")

    def say(self, line: str) -> None:
        """A line above the progress bar, or a plain one where there is no terminal."""
        if self._writes:
            tqdm.write(line, file=sys.stderr)

    def restart_clock(self) -> None:
        """Begins the next window of throughput."""
        self._steps, self._tokens, self._flops, self._data_seconds = 0, 0.0, 0.0, 0.0
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """What is done inside (an evaluation, a save) takes no time from the window of throughput."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        self.say(f"{self._title}: {self._goodput.line()}")
        if self._writes:
            self._bar.close()
            self._board.close()
            self._lines.close()

    def _per_token(self, group: str, m: dict[str, np.ndarray]) -> dict[str, float]:
        nats = float(m["elbo_sum"] / max(float(m["tokens"]), 1.0))
        bits = nats / math.log(2)
        found = {f"{group}/{self._what}_nats_per_token": nats, f"{group}/{self._what}_bits_per_token": bits}
        if self._tokens_per_byte is not None:
            found[f"{group}/{self._what}_bits_per_byte"] = bits * self._tokens_per_byte
        return found

    def _show(self, step: int, scalars: dict[str, float]) -> None:
        if not self._writes:
            return
        smooth = scalars[f"1_loss/smooth_{self._what}_nats_per_token"]
        words = [f"{self._what} {smooth:.3f} nats/token (smooth)"]
        if "4_speed/tokens_per_second" in scalars:
            words.append(f"{scalars['4_speed/tokens_per_second']:,.0f} tokens/s")
        self._bar.set_postfix_str(", ".join(words))
        if self._plain and (time.perf_counter() - self._last_line > _PLAIN_SECONDS or step == self._total):
            self._last_line = time.perf_counter()
            if "4_speed/mfu" in scalars:
                words.append(f"MFU {scalars['4_speed/mfu']:.1%}")
            if "4_speed/seconds_per_step" in scalars:
                minutes, seconds = divmod(round((self._total - step) * scalars["4_speed/seconds_per_step"]), 60)
                words.append(f"{minutes}:{seconds:02d} left")
            self.say(f"{self._title}: step {step}/{self._total} {', '.join(words)}")


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _short(scalars: dict[str, float]) -> str:
    return ", ".join(f"{name.rsplit('/', 1)[1].replace('_', ' ')} {value:.4f}" for name, value in scalars.items())
