"""What asks a run to save, or to stop, between two steps: SIGTERM, Ctrl-C and the clock. All processes heed it at once.

JAX is imported only where several processes need it: signals are heard while everything else is still being imported.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from llada_jax import cli

NOTHING, SAVE = 0, 1  # what a run is asked; else the number of the signal that stops it
_END_SECONDS = 2.0  # that what is done before the end may take


class Signals:
    """A context in which SIGTERM and Ctrl-C end the program with one line, or, inside `asking`, ask it to save.

    A second one ends it at once. Python gives signals to the main thread, when that is free, and a KeyboardInterrupt
    that is raised inside a callback of JAX is lost; so a thread of ours reads the numbers from a pipe.
    """

    def __init__(self):
        self._listening = self._saving = False
        self.asked = NOTHING  # the first signal that came
        self.before_end: list[Callable[[int, str], object]] = []  # called with the exit code and the line

    def __enter__(self) -> "Signals":
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            self._writer, self._outer = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, lambda *_: None) for number in cli.STOPPED}
            threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        self._listening = True
        return self

    def __exit__(self, *_) -> None:
        self._listening = False
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(self._outer)
            os.close(self._writer)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """A section in which a signal asks to save; listens in it where nobody does yet, as in a notebook."""
        with contextlib.nullcontext() if self._listening else self:
            self._saving = True
            try:
                yield
            finally:
                self._saving = False

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while byte := numbers.read(1):
                if byte[0] not in cli.STOPPED:
                    continue
                if self.asked:
                    cli.end(128 + byte[0])
                self.asked = byte[0]
                if not self._saving:
                    self._end(signal.Signals(byte[0]))

    def _end(self, number: signal.Signals) -> None:
        line = f"stopped by {cli.SIGNALS[number]} before it could save; the same command starts again"
        cli.say(line)
        code = cli.STOPPED[number]
        last = [threading.Thread(target=act, args=(code, line), daemon=True) for act in self.before_end]
        for thread in last:
            thread.start()
        for thread in last:
            thread.join(_END_SECONDS)
        cli.end(code)


class Requests:
    """What the run is asked after each step, the same on every process, although each hears only its own signals.

    Each process tells the others what it was asked by a maximum over the devices that runs beside the steps; the answer
    is read a step later, so that nobody waits for it. (jax.experimental.multihost_utils.reached_preemption_sync_point
    knows SIGTERM alone: no Ctrl-C, no clock, and its handler in C++ leaves a second signal unheard.)
    """

    def __init__(self, mesh: Any, every_minutes: float, signals: Signals):
        self._mesh, self._seconds, self._signals = mesh, 60 * every_minutes, signals
        self._told, self._saved = None, time.monotonic()

    def poll(self) -> int:
        """NOTHING, SAVE or the number of a signal; to be called after every step, by every process."""
        import jax

        due = self._seconds > 0 and time.monotonic() - self._saved >= self._seconds
        own = max(self._signals.asked, SAVE if due and jax.process_index() == 0 else NOTHING)
        if jax.process_count() == 1:
            return own
        heard = NOTHING if self._told is None else int(self._told)
        self._told = _largest(own, self._mesh)
        return heard

    def saved(self) -> None:
        """Starts the clock anew, and forgets what was asked before."""
        self._told, self._saved = None, time.monotonic()


def _largest(value: int, mesh: Any) -> Any:
    """int32 [] on every device: the largest `value` of any process. Waits for nothing."""
    import jax
    import jax.numpy as jnp

    from llada_jax.parallel.mesh import of_hosts

    return jax.jit(jnp.max)(of_hosts(value, mesh))
