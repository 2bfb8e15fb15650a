"""What others wrote: small files of bounded size, names that stay in their directory. Nothing here runs any of it."""

import json
import os
from pathlib import Path

from llada_jax.inputs import InputError

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
