"""The files that a run adds to while it trains. A run that continues from an earlier step cuts them back to it.

A full disk delays what is written; `flush`, which comes before a checkpoint becomes visible, raises OSError for it.
"""

import contextlib
import errno
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import BinaryIO

_BUFFER_BYTES = 2**20  # what may wait for a full disk


class Lines:
    """metrics.jsonl: one JSON object a line, each with its "step"."""

    def __init__(self, path: Path, first_step: int):
        _cut_back(path, first_step)
        self._file = path.open("ab", buffering=_BUFFER_BYTES)

    def write(self, values: dict) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        with _unless_full():
            self._file.flush()

    def flush(self) -> None:
        _to_disk(self._file)

    def close(self) -> None:
        self._file.close()


class Board:
    """TensorBoard's event file of one run of the program; what earlier ones wrote after `first_step` is hidden.

    tensorboardX's own writer loses what waits in its thread when the process is killed, and hangs on a full disk.
    """

    def __init__(self, workdir: Path, first_step: int):
        from tensorboardX import summary  # here, because it imports PyTorch where that is installed: 3 seconds
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._crc = Event, summary, masked_crc32c
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = (workdir / name).open("ab", buffering=_BUFFER_BYTES)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step=step, summary=self._summary.scalar(name, value))

    def add_text(self, name: str, text: str, step: int) -> None:
        self._add(step=step, summary=self._summary.text(name, text))

    def flush(self) -> None:
        _to_disk(self._file)

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + struct.pack("<I", self._crc(length)) + data + struct.pack("<I", self._crc(data))
        with _unless_full():
            self._file.write(record)


def _cut_back(path: Path, step: int) -> None:
    """Takes away the lines of later steps, and what a kill left of the last one, all at once."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = b"".join(line for line in before.splitlines(keepends=True) if _is_until(line, step))
    if kept == before:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        _to_disk(file)
    temporary.replace(path)


def _is_until(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _unless_full():
    """A full disk: the buffer keeps what it could not write and tries again the next time."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
