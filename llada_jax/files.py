"""Files: those of others read within bounds, and checksums of a directory. Nothing here runs what it reads."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


CHECKSUMS = "checksums.json"  # {file: [bytes, SHA-256]}

_THREADS = 8  # hashing lets other threads run


def write_checksums(directory: Path) -> None:
    """Hashes every file below `directory`, and sees to it that they are on the disk and not only on their way."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = list(pool.map(_facts, files))
    names = [path.relative_to(directory).as_posix() for path in files]
    with (directory / CHECKSUMS).open("w") as file:
        json.dump(dict(zip(names, facts, strict=True)), file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def damage(directory: Path, share: int = 0, shares: int = 1) -> str:
    """The first file that is not as its checksum says, and how; "" if none is, or if there are no checksums.

    Looks at every shares-th file, from number `share` on: processes divide the reading among themselves.
    """
    try:
        expected = json.loads((directory / CHECKSUMS).read_text())
        files = sorted(expected.items())[share::shares]
    except FileNotFoundError:
        return ""  # from before there were checksums
    except (OSError, ValueError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    for name, _ in files:
        if not (directory / name).resolve().is_relative_to(directory.resolve()):
            return f"{CHECKSUMS} names {name!r}, which is not in the directory"
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
