"""Finished requests on disk, each as soon as it is there: a killed evaluation loses only what was under way."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.fields import InputError
from llada_jax.parallel import processes

_SYNC_SECONDS = 1.0  # between two waits for the disk


class Store:
    """Answers by key, in a file of JSON lines. The key names all that an answer depends on, so none is ever stale."""

    def __init__(self, path: Path | None):
        """path: of the file; None: nothing is kept. Raises InputError for a file that holds something else."""
        self._path, self._synced = None, time.monotonic()
        self._answers: dict[str, Any] = {}
        if path is None:
            return
        good = 0
        for line in _bytes_of_first(path).splitlines(keepends=True):
            try:
                value = json.loads(line)
                self._answers[value["key"]] = value["answer"]
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{path}: holds other lines than answers; choose another --output") from error
                break  # what a kill left of the last line
            good += len(line)
        if processes.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, good)
            self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, key: str, answer: Any, **facts: Any) -> None:
        """Keeps an answer; the facts are for readers of the file."""
        self._answers[key] = answer
        if self._path is None:
            return
        line = json.dumps({"key": key, "answer": answer, **facts}, ensure_ascii=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode(errors="replace"))
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                file.flush()
                os.fsync(file.fileno())
                self._synced = time.monotonic()


def digest(*parts: Any) -> str:
    """SHA-256 of what JSON can hold, hexadecimal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def model_digest(model) -> str:
    """Changes with any parameter: exact sums of their bits, which neither mesh nor order of addition change."""

    def sums(x):
        bits = jax.lax.bitcast_convert_type(x, np.uint16 if x.dtype.itemsize == 2 else np.uint32).astype(np.uint32)
        return jax.numpy.sum(bits), jax.numpy.sum(bits * bits)

    leaves = jax.tree.leaves(model)
    found = jax.jit(lambda leaves: [sums(x) for x in leaves])(leaves)
    return digest(
        str(model.config), [[list(x.shape), str(x.dtype)] for x in leaves], [[int(n) for n in s] for s in found]
    )


def _bytes_of_first(path: Path) -> bytes:
    """What the first process finds in the file, on every process; nothing if there is none."""
    data = path.read_bytes() if processes.is_first() and path.exists() else b""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(data))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()
