"""What a run says of itself besides its numbers: events, goodput, and where it stands still.

Goodput is how much of a run's time went into steps that count, and what took the rest. It is counted over the life of a
workdir, through kills and restarts, in goodput.json, which is replaced every few seconds. None of this ends a run: what
can't be written is said once on stderr.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax

from llada_jax.fields import InputError
from llada_jax.files import read_json, write_atomic
from llada_jax.parallel import processes


class Events:
    """Appends lines {"time", "step", "event", "cause", "action"} to `workdir`/events.jsonl.

    time: seconds since 1970. The first process writes; `own` events, which the others can't know of, reach it from
    everywhere, and are written when it calls `collect`.
    """

    def __init__(self, workdir: str | Path):
        self._path = Path(workdir) / "events.jsonl"

    def write(self, event: str, *, step: int, cause: str, action: str, own: bool = False) -> None:
        line = {"time": time.time(), "step": step, "event": event, "cause": cause, "action": action}
        text = json.dumps(line, ensure_ascii=False)
        if processes.is_first():
            self._append(text)
        elif own:
            processes.send(text)

    def collect(self) -> None:
        """Writes what the other processes have sent; for the first one."""
        for text in processes.received():
            self._append(text)

    def _append(self, text: str) -> None:
        try:
            # Not blocking, for a pipe that nobody reads; closed at once, so that a kill loses nothing.
            with open(self._path, "ab", opener=lambda path, mode: os.open(path, mode | os.O_NONBLOCK, 0o666)) as file:
                file.write(text.encode() + b"\n")
        except OSError as error:
            warn_once(f"{self._path}: {error.strerror}; not in it: {text}")


_warned: set[str] = set()


def warn_once(line: str) -> None:
    """A line on stderr, if it was not there yet."""
    if line not in _warned:
        _warned.add(line)
        print(line, file=sys.stderr, flush=True)


# Where time goes, as it is shown; "step" is the good part. "again": steps computed before, lost to a kill or undone by
# a rollback. "down": from the last sign of life of one process to the start of the next.
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
        """begun: seconds since 1970 at which this process began. A damaged goodput.json is counted anew."""
        self._path = Path(workdir) / "goodput.json"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._reached = 0  # the last step that any process of this run began
        self._saved = 0  # the newest checkpoint that there was
        self._again = False
        self._lock = threading.Lock()
        try:
            if stored := read_goodput(workdir):
                self._seconds |= {phase: float(stored["seconds"][phase]) for phase in PHASES}
                self._seconds["down"] += max(begun - float(stored["time"]), 0.0)
                self._reached, self._saved = int(stored["step"]), int(stored.get("saved", 0))
        except (InputError, ValueError, KeyError, TypeError, OverflowError) as error:
            warn_once(f"{self._path}: damaged ({error!r}); time counts from now on")
            self._seconds = dict.fromkeys(PHASES, 0.0)
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
        shown = ", ".join(f"{PHASES[phase]} {spent / total:.1%}" for spent, phase in lost)
        return f"goodput {good / total:.1%} of {_clock(total)}; lost: {shown or 'nothing'}"

    def saved(self, step: int) -> None:
        """Notes that there is a checkpoint of `step`: a run that finds none later does not begin anew by itself."""
        self._saved = step
        self.write()

    def write(self) -> None:
        """Keeps it for the next process."""
        if processes.is_first():
            stored = {"time": time.time(), "step": self._reached, "saved": self._saved, "seconds": self.seconds()}
            try:
                write_atomic(self._path, json.dumps(stored, indent=1))
            except OSError as error:
                warn_once(f"{self._path} is not up to date: {error.strerror}")

    def _counted(self, phase: str) -> str:
        return "again" if phase == "step" and self._again else phase


def read_goodput(workdir: str | Path) -> dict:
    """What goodput.json holds; {} if there is none. Raises InputError if it is damaged."""
    path = Path(workdir) / "goodput.json"
    return read_json(path) if path.exists() else {}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


_UNTIMED = ("start", "compile", "restore")  # may take long
_WRITE_SECONDS = 5.0


class Watchdog:
    """Watches `goodput` until `close`: a phase of more than `stall_seconds` is reported once (0: never).

    Each process prints its own on stderr, with the stacks of all its threads, even where Python itself stands still.
    """

    def __init__(self, goodput: Goodput, events: Events, stall_seconds: float):
        self._goodput, self._events, self._stall_seconds = goodput, events, stall_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._goodput.write()
        self._events.collect()

    def _watch(self) -> None:
        seen, reported, written = None, None, time.monotonic()
        while not self._stop.wait(min(1.0, self._stall_seconds / 4 or 1.0)):
            now, moment = self._goodput.now, time.monotonic()
            if now != seen:
                seen = now
                self._arm(now, moment)
            if 0 < self._stall_seconds < moment - now.since and now.phase not in _UNTIMED and now != reported:
                reported = now
                cause = f"process {jax.process_index()} has been in phase {now.phase!r} for {moment - now.since:.0f} s"
                print(f"stalled at step {now.step}: {cause}; its threads are above", file=sys.stderr, flush=True)
                action = "its threads are on stderr; the run goes on waiting"
                self._events.write("stall", step=now.step, cause=cause, action=action, own=True)
            if moment - written > _WRITE_SECONDS:
                written = moment
                self._goodput.write()
                self._events.collect()

    def _arm(self, now: Now, moment: float) -> None:
        """Sets the timer of faulthandler, which needs no Python to go off, for the phase that has begun."""
        faulthandler.cancel_dump_traceback_later()
        if self._stall_seconds > 0 and now.phase not in _UNTIMED and sys.__stderr__ is not None:
            left = max(self._stall_seconds - (moment - now.since), 0.01)
            faulthandler.dump_traceback_later(left, file=sys.__stderr__)
