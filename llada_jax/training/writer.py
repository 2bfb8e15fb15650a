"""The files that a run adds to while it trains. A run that continues from an earlier step cuts them back to it.

A full disk delays metrics.jsonl; `flush`, which comes before a checkpoint, raises OSError for it. TensorBoard's file is
a copy for the eyes: what it misses while the disk is full is in metrics.jsonl.
"""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llada_jax.files import write_atomic
from llada_jax.training.monitor import warn_once

_BUFFER_BYTES = 2**20  # what may wait for a full disk
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Lines:
    """metrics.jsonl: one JSON object a line, each with its "step"."""

    def __init__(self, path: Path, first_step: int):
        try:
            _move_aside(path)
            _cut_back(path, first_step)
            self._file = path.open("ab", buffering=_BUFFER_BYTES)
        except OSError as error:
            warn_once(f"{path}: {error.strerror}; the run goes on without it")
            self._file = open(os.devnull, "wb")

    def write(self, values: dict) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        try:
            self._file.flush()
        except OSError as error:  # the buffer keeps what it could not write, and tries again the next time
            if error.errno not in _FULL:
                raise

    def flush(self) -> None:
        self._file.flush()
        if os.path.isfile(self._file.name):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Board:
    """TensorBoard's event file of one run of the program; what earlier ones wrote after `first_step` is hidden.

    tensorboardX's SummaryWriter would lose what waits in its thread when the process is killed, and hang on a full
    disk; its EventsWriter has no thread.
    """

    def __init__(self, workdir: Path, first_step: int):
        # Where they are installed, tensorboardX imports them, for arrays and places that it is never given here: five
        # seconds.
        with _without("torch", "boto3", "google.cloud.storage"):
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._event, self._summary = Event, summary
        self._open = lambda: EventsWriter(str(workdir / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
        self._writer: EventsWriter | None = None
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step=step, summary=self._summary.scalar(name, value))

    def add_text(self, name: str, text: str, step: int) -> None:
        self._add(step=step, summary=self._summary.text(name, text))

    def flush(self) -> None:
        self._do(lambda writer: writer.flush())

    def close(self) -> None:
        self._do(lambda writer: writer.close())

    def _add(self, **fields) -> None:
        self._do(lambda writer: writer.write_event(self._event(wall_time=time.time(), **fields)))

    def _do(self, action) -> None:
        try:
            self._writer = self._writer or self._open()
            action(self._writer)
        except OSError as error:  # a record may be cut off here: the next one begins a new file
            self._writer = None
            warn_once(f"TensorBoard's file: {error.strerror}; a new one is begun when there is room")


@contextlib.contextmanager
def _without(*modules: str) -> Iterator[None]:
    """While it is open, those of them that are not loaded yet are not found."""
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _move_aside(path: Path) -> None:
    """Renames what is no file, such as a directory or a pipe, which would never end."""
    if path.exists() and not path.is_file():
        other = path.with_name(f"{path.name}.damaged")
        path.rename(other)
        warn_once(f"{path}: not a file; moved to {other.name}, and a new one is begun")


def _cut_back(path: Path, step: int) -> None:
    """Takes away the lines of later steps, and what a kill left of the last one, all at once."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = b"".join(line for line in before.splitlines(keepends=True) if _is_until(line, step))
    if kept != before:
        write_atomic(path, kept)


def _is_until(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
