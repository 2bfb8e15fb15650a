"""What a run says of itself besides its numbers: events, goodput, and where it stands still.

Goodput is how much of a run's time went into steps that count, and what took the rest. It is counted over the life of a
workdir, through kills and restarts, in goodput.json, which is replaced every few seconds.
"""

import faulthandler
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax

from llada_jax.fields import InputError
from llada_jax.parallel import processes


class Events:
    """Appends lines {"time", "step", "event", "cause", "action"} to `workdir`/events.jsonl, on the first process only.

    time: seconds since 1970.
    """

    def __init__(self, workdir: str | Path):
        self._path = Path(workdir) / "events.jsonl"

    def write(self, event: str, *, step: int, cause: str, action: str) -> None:
        line = {"time": time.time(), "step": step, "event": event, "cause": cause, "action": action}
        if processes.is_first():
            with self._path.open("a", encoding="utf-8") as file:  # closed at once: a kill loses nothing
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# Where time goes, as it is told; "step" is the good part. "again": steps computed before, lost to a kill or undone by a
# rollback. "down": from the last sign of life of one process to the start of the next.
PHASES = {
    "start": "starting", "compile": "compiling", "restore": "restoring", "data": "waiting for data", "step": "steps",
    "again": "steps computed again", "save": "saving", "evaluate": "evaluating", "sample": "sampling", "down": "down",
}  # fmt: skip


class Now(NamedTuple):
    """What the loop is at: the phase, since when (time.monotonic), and which step was begun last."""

    phase: str
    since: float
    step: int


class Goodput:
    """The clock of a run, which is in one phase at any moment. Another thread may read and write it."""

    def __init__(self, workdir: str | Path, begun: float):
        """begun: seconds since 1970 at which this process began. Raises InputError if goodput.json is damaged."""
        self._path = Path(workdir) / "goodput.json"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._reached = 0  # the last step that any process of this run began
        self._again = False
        self._lock = threading.Lock()
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text())
                self._seconds |= {phase: float(stored["seconds"][phase]) for phase in PHASES}
                self._seconds["down"] += max(begun - float(stored["time"]), 0.0)
                self._reached = int(stored["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self._path}: damaged ({error!r}); remove it, and time counts from now on"
                ) from error
        self.now = Now("start", time.monotonic() - max(time.time() - begun, 0.0), 0)

    def enter(self, phase: str, *, step: int | None = None, hidden: bool = False) -> None:
        """Ends one phase and begins the next; `step`: if it is a step's. `hidden`: the device was busy all through what
        ends, so nothing was lost."""
        with self._lock:
            now = time.monotonic()
            self._seconds[self._counted("step" if hidden else self.now.phase)] += now - self.now.since
            if step is not None:
                self._again = step <= self._reached
                self._reached = max(step, self._reached)
            self.now = Now(phase, now, self.now.step if step is None else step)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        with self._lock:
            running = {self._counted(self.now.phase): time.monotonic() - self.now.since}
            return {phase: spent + running.get(phase, 0.0) for phase, spent in self._seconds.items()}

    def scalars(self) -> dict[str, float]:
        """The share of steps that count in all time so far, and those of what was lost."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        shares = {f"4_speed/lost_to_{phase}": spent / total for phase, spent in seconds.items() if phase != "step"}
        return {"4_speed/goodput": seconds["step"] / total, **shares}

    def line(self) -> str:
        """The same in words, the largest loss first."""
        seconds = self.seconds()
        total, good = max(sum(seconds.values()), 1e-9), seconds.pop("step")
        lost = sorted(((spent, phase) for phase, spent in seconds.items() if spent >= 0.0005 * total), reverse=True)
        told = ", ".join(f"{PHASES[phase]} {spent / total:.1%}" for spent, phase in lost)
        return f"goodput {good / total:.1%} of {_clock(total)}; lost: {told or 'nothing'}"

    def write(self) -> None:
        """Keeps it for the next process. Raises OSError when the disk is full."""
        if processes.is_first():
            stored = {"time": time.time(), "step": self._reached, "seconds": self.seconds()}
            temporary = self._path.with_name("goodput.json.tmp")
            temporary.write_text(json.dumps(stored, indent=1))
            temporary.replace(self._path)

    def _counted(self, phase: str) -> str:
        return "again" if phase == "step" and self._again else phase


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


_UNTIMED = ("start", "compile", "restore")  # may take long
_WRITE_SECONDS = 5.0


class Watchdog:
    """Watches `goodput` until `close`: a phase of more than `stall_seconds` is reported once (0: never).

    Each process tells its own on stderr, with the stacks of all its threads; the first also in events.jsonl.
    """

    def __init__(self, goodput: Goodput, events: Events, stall_seconds: float):
        self._goodput, self._events, self._stall_seconds = goodput, events, stall_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._goodput.write()

    def _watch(self) -> None:
        reported, written, failure = None, time.monotonic(), ""
        while not self._stop.wait(min(1.0, self._stall_seconds / 4 or 1.0)):
            now, moment = self._goodput.now, time.monotonic()
            if 0 < self._stall_seconds < moment - now.since and now.phase not in _UNTIMED and now != reported:
                reported = now
                self._report(now.phase, now.step, moment - now.since)
            if moment - written > _WRITE_SECONDS:
                written = moment
                try:
                    self._goodput.write()
                except OSError as error:
                    if str(error) != failure:  # once, not every few seconds
                        failure = str(error)
                        print(f"goodput.json is not up to date: {failure}", file=sys.stderr)

    def _report(self, phase: str, step: int, seconds: float) -> None:
        cause = f"process {jax.process_index()} has been in phase {phase!r} for {seconds:.0f} seconds"
        stacks = _stacks()
        print(f"stalled at step {step}: {cause}; its threads:\n{stacks}", file=sys.stderr, flush=True)
        self._events.write("stall", step=step, cause=f"{cause}\n{stacks}", action="reported; the run goes on waiting")


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
