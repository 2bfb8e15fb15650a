"""Checksums of a directory: written when it is complete, compared when it is read again."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "checksums.json"  # {file: [bytes, SHA-256]}

_THREADS = 8  # hashing lets other threads run


def write_checksums(directory: Path) -> None:
    """Hashes every file below `directory`, and sees to it that they are on the disk and not only on their way."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = list(pool.map(_facts, files))
    names = [path.relative_to(directory).as_posix() for path in files]
    with (directory / NAME).open("w") as file:
        json.dump(dict(zip(names, facts, strict=True)), file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def damage(directory: Path, share: int = 0, shares: int = 1) -> str:
    """The first file that is not as its checksum says, and how; "" if none is, or if there are no checksums.

    Looks at every shares-th file, from number `share` on: processes divide the reading among themselves.
    """
    try:
        expected = json.loads((directory / NAME).read_text())
        files = sorted(expected.items())[share::shares]
    except FileNotFoundError:
        return ""  # from before there were checksums
    except (OSError, ValueError, AttributeError):
        return f"{NAME} cannot be read"
    for name, _ in files:
        if not (directory / name).resolve().is_relative_to(directory.resolve()):
            return f"{NAME} names {name!r}, which is not in the directory"
    with ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(lambda item: _difference(directory, *item), files)), "")


def _facts(path: Path) -> list:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _difference(directory: Path, name: str, expected: list) -> str:
    try:
        found = _facts(directory / name)
    except OSError as error:
        return f"{name}: {(error.strerror or 'cannot be read').lower()}"
    if found == expected:
        return ""
    if found[0] != expected[0]:
        return f"{name} has {found[0]} bytes, not {expected[0]}"
    return f"{name} has the right size and another content"
