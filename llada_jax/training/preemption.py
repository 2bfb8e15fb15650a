"""What asks a run to save, or to stop, between two steps: SIGTERM and the clock. All processes heed it at one step."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

NOTHING, SAVE, STOP = range(3)


class Requests:
    """A context in which SIGTERM is a request to save and stop, and a second one, or Ctrl-C after it, the end at once.

    Where several processes train, each tells what it was asked to all the others by a sum over the devices that runs
    beside the steps. The answer is read a step later, so nobody waits for it, and all read the same.
    """

    def __init__(self, mesh: jax.sharding.Mesh, every_minutes: float):
        self._mesh, self._seconds = mesh, 60 * every_minutes
        self._asked, self._told, self._saved = NOTHING, None, time.monotonic()
        self._most = jax.jit(jnp.max)

    def __enter__(self) -> "Requests":
        # Python hands signals to the main thread only, and only when it is free; a thread of ours hears at once.
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            ear, mouth = os.pipe()
            os.set_blocking(mouth, False)
            self._pipe = ear, mouth, signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
            self._handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None)}
            threading.Thread(target=self._listen, args=(ear,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
            signal.set_wakeup_fd(self._pipe[2])
            os.close(self._pipe[1])

    def poll(self) -> int:
        """NOTHING, SAVE or STOP; to be called after every step, by every process."""
        due = self._seconds > 0 and time.monotonic() - self._saved >= self._seconds
        own = max(self._asked, SAVE if due and jax.process_index() == 0 else NOTHING)
        if jax.process_count() == 1:
            return own
        heard = NOTHING if self._told is None else int(self._told)
        shape, axes = self._mesh.devices.shape, P(*self._mesh.axis_names)
        value = np.full((1,) * len(shape), own, np.int32)
        everyone = jax.make_array_from_callback(shape, NamedSharding(self._mesh, axes), lambda _: value)
        self._told = self._most(everyone)
        return heard

    def saved(self) -> None:
        """Starts the clock anew, and forgets what was asked before."""
        self._told, self._saved = None, time.monotonic()

    def _listen(self, ear: int) -> None:
        with open(ear, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in (signal.SIGTERM, signal.SIGINT):
                    if self._asked == STOP:
                        os._exit(128 + number[0])
                    if number[0] == signal.SIGTERM:
                        self._asked = STOP
