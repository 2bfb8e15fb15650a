"""A thread that tells where a run stands still, and keeps its clock on disk. It changes nothing."""

import faulthandler
import sys
import tempfile
import threading
import time

import jax

from llada_jax.training.events import Events
from llada_jax.training.goodput import Goodput

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
