"""Files: those of others read within bounds, checksums of a checkpoint, atomic writes.

Nothing here runs what it reads.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from llada_jax.fields import InputError

LARGEST_JSON = 2**26  # bytes; parsing takes some twenty times as much memory at worst
_LONGEST_NAME = 255  # bytes, on every file system


def require_file(path: Path, most_bytes: int | None = None) -> None:
    """Raises InputError unless `path` is a regular file, of at most so many bytes: no pipe, no device, no directory."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:  # a name with a NUL
        raise InputError(f"{str(path)!r}: cannot be read ({error})") from error
    if size is None:
        raise InputError(f"{path}: not a file, or a link to one that is gone; copy it again")
    if most_bytes is not None and size > most_bytes:
        raise InputError(f"{path}: has {size} bytes, no such file has over {most_bytes}; copy it again")


def require_files(directory: Path) -> None:
    """Raises InputError where something below `directory` is neither a file nor a directory, such as a pipe."""
    for parent, _, names in os.walk(directory):
        for path in (Path(parent, name) for name in names):
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: not a file; copy it again")


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises InputError if it is no file, too large or not UTF-8."""
    require_file(path, LARGEST_JSON)
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); copy it again") from error


def read_json(path: Path) -> dict:
    """A file that holds one JSON object. Raises InputError otherwise."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> dict:
    """One JSON object. Raises InputError that begins with `where` otherwise."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({str(error)[:200]}); copy it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; copy it again")
    return value


def inside(directory: Path, name: object, where: str) -> Path:
    """The file `name` of `directory`. Raises InputError, which says `where` the name stood, if it leads out of it.

    A name is a plain one: no separators, no "..". A link may lead to another file of the directory.
    """
    plain = (
        isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name
    )
    if not isinstance(name, str) or not plain or len(name.encode(errors="replace")) > _LONGEST_NAME:
        raise InputError(f"{where}: names the file {str(name)[:80]!r}, which is no plain file name; copy it again")
    path = directory / name
    if path.is_symlink() and not path.resolve().is_relative_to(directory.resolve()):
        raise InputError(f"{path}: is a link out of its directory; put the file itself there")
    return path


COMMIT = "commit_success.txt"  # Orbax's: the last file that it writes into a checkpoint

_CHECKSUMS = "checksums{}.json"  # of the files that one process wrote: {file: [bytes, SHA-256]}; "" is the first
_MARKERS = ("checksums", COMMIT, "damaged.txt")  # how the names begin of files that have no checksum
_THREADS = 8  # hashing lets other threads run


def write_checksums(directory: Path, process: int = 0) -> None:
    """Hashes what one process wrote of a checkpoint, and sees to it that it is on the disk.

    Orbax names a process' own files "…process_N"; the first process hashes all that is not another's.
    """
    names = [name for name in _names(directory) if _writer(name) == process]
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = list(pool.map(lambda name: _facts(directory / name), names))
    place = directory / _CHECKSUMS.format(f".{process}" if process else "")
    write_atomic(place, json.dumps(dict(zip(names, facts, strict=True)), indent=0))


def damage(directory: Path, share: int = 0, shares: int = 1) -> str:
    """The first file that is not as its checksum says, and how; "" if none is, or if there are no checksums.

    Looks at every shares-th file, from number `share` on: processes divide the reading among themselves.
    """
    try:
        expected = checksums(directory)
    except InputError as error:
        return str(error)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _difference(directory, *item), sorted(expected.items())[share::shares])
        return next(filter(None, found), "")


def checksums(directory: Path) -> dict[str, list]:
    """{file: [bytes, SHA-256]} of a checkpoint, of all processes; {} if it has none.

    Raises InputError where such a file is not what `write_checksums` writes.
    """
    expected: dict[str, Any] = {}
    for place in sorted(directory.glob(_CHECKSUMS.format("*"))):
        try:
            expected |= read_json(place)
        except InputError:
            raise InputError(f"{place.name} cannot be read") from None
    for name, facts in expected.items():
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise InputError(f"checksums name {name[:80]!r}, which is not in the directory")
        if not isinstance(facts, list) or [type(fact) for fact in facts] != [int, str]:
            raise InputError(f"checksums of {name[:80]!r} are not a size and a SHA-256")
    return expected


def _names(directory: Path) -> list[str]:
    """The files below a checkpoint that have checksums, relative to it."""
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in files if not name.startswith(_MARKERS))


def _writer(name: str) -> int:
    """The process that wrote a file of a checkpoint."""
    found = re.search(r"process_(\d+)", name)
    return int(found[1]) if found else 0


def _facts(path: Path) -> list:
    require_file(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _difference(directory: Path, name: str, expected: list) -> str:
    try:
        found = _facts(directory / name)
    except InputError:
        return f"{name}: no such file" if not (directory / name).exists() else f"{name}: not a file"
    except OSError as error:
        return f"{name}: {(error.strerror or 'cannot be read').lower()}"
    if found == expected:
        return ""
    if found[0] != expected[0]:
        return f"{name} has {found[0]} bytes, not {expected[0]}"
    return f"{name} has the right size and another content"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replaces a file at once: whoever reads it, after a kill or a power cut too, finds the old content or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
