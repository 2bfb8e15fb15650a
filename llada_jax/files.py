"""Files: those of others read within bounds, checksums of a checkpoint, files and directories that appear at once.

Nothing here runs what it reads. A path may lie in a bucket (buckets.path_of) where that is said.
"""

import contextlib
import errno
import fnmatch
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llada_jax.fields import InputError
from llada_jax.storage import buckets

LARGEST_JSON = 2**26  # bytes; parsing takes some twenty times as much memory at worst
_DEEPEST_JSON = 100  # levels; Python reads about a thousand, and may then not be able to write them
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


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """A file as a whole, also of a bucket. Raises InputError if it is no regular file, too large or cannot be read."""
    if buckets.is_bucket(path):
        try:
            return buckets.read(path)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such object in the bucket; copy it again") from error
    require_file(path, most_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises InputError if it is no regular file or cannot be read."""
    require_file(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises InputError if it is no file, too large or not UTF-8."""
    data = read_bytes(path, LARGEST_JSON)
    try:
        return data.decode("utf-8")
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
    level = [value]
    for _ in range(_DEEPEST_JSON):
        inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level = list(itertools.chain.from_iterable(inner))
    if level:
        raise InputError(f"{where}: nested over {_DEEPEST_JSON} levels deep; copy it again")
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


_LAST = ("manifest.json", "config.json")  # of a directory in a bucket: without them it is none

COMMIT = "commit_success.txt"  # Orbax's: the last file that it writes into a checkpoint

CHECKSUMS = "checksums.json"  # of the files that the first process wrote: {file: [bytes, SHA-256]}
_SIDECARS = "checksums*.json"  # those of process N are in checksums.N.json
_MARKERS = ("checksums", COMMIT, "damaged.txt")  # how the names begin of files that have no checksum
_THREADS = 8  # hashing lets other threads run


def write_checksums(directory: Path, process: int = 0) -> None:
    """Hashes what one process wrote of a checkpoint, also in a bucket, and sees to it that it is on the disk.

    Orbax names a process' own files "…process_N"; the first process hashes all that is not another's.
    """
    names = [name for name in _names(directory) if _writer(name) == process]
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = list(pool.map(lambda name: _facts(directory / name), names))
    place = directory / (f"checksums.{process}.json" if process else CHECKSUMS)
    write_atomic(place, json.dumps(dict(zip(names, facts, strict=True)), indent=0))


def damage(directory: Path, share: int = 0, shares: int = 1, *, only: Callable[[str], bool] = lambda name: True) -> str:
    """The first file that is not as its checksum says, and how; "" if none is, or if there are no checksums.

    Of a directory of this machine or of a bucket.

    Looks at every shares-th file, from number `share` on: processes divide the reading among themselves. only: which
    files, by their names relative to the directory.
    """
    try:
        expected = checksums(directory)
    except InputError as error:
        return str(error)
    with ThreadPoolExecutor(_THREADS) as pool:
        files = sorted(item for item in expected.items() if only(item[0]))[share::shares]
        found = pool.map(lambda item: _difference(directory, *item), files)
        return next(filter(None, found), "")


def checksums(directory: Path) -> dict[str, list]:
    """{file: [bytes, SHA-256]} of a checkpoint, of all processes; {} if it has none.

    Raises InputError where such a file is not what `write_checksums` writes.
    """
    expected: dict[str, Any] = {}
    for place in _sidecars(directory):
        try:
            expected |= read_json(place)
        except InputError:
            raise InputError(f"{place.name} cannot be read") from None
    for name, facts in expected.items():
        if not _leads_inside(directory, name):
            raise InputError(f"checksums name {name[:80]!r}, which is not in the directory")
        if not isinstance(facts, list) or [type(fact) for fact in facts] != [int, str]:
            raise InputError(f"checksums of {name[:80]!r} are not a size and a SHA-256")
    return expected


def _sidecars(directory: Path) -> list[Path]:
    if buckets.is_bucket(directory):
        names = sorted(buckets.files_below(directory))
        return [directory / name for name in names if fnmatch.fnmatch(name, _SIDECARS) and "/" not in name]
    return sorted(directory.glob(_SIDECARS))


def _names(directory: Path) -> list[str]:
    """The files below a checkpoint that have checksums, relative to it."""
    if buckets.is_bucket(directory):
        files = buckets.files_below(directory)
    else:
        files = _files(directory)
    return sorted(name for name in files if not name.startswith(_MARKERS))


def _files(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]


def in_order(directory: Path) -> list[str]:
    """The files below a directory, in the order in which they go to a bucket: first what others do not look for."""
    return sorted(_files(directory), key=lambda name: (os.path.basename(name) in _LAST, name))


def _writer(name: str) -> int:
    """The process that wrote a file of a checkpoint."""
    found = re.search(r"process_(\d+)", name)
    return int(found[1]) if found else 0


def _leads_inside(directory: Path, name: str) -> bool:
    if buckets.is_bucket(directory):
        return buckets.leads_inside(name)
    try:
        return (directory / name).resolve().is_relative_to(directory.resolve())
    except (OSError, ValueError, RuntimeError):  # too long; NUL or a lone surrogate; a loop of links
        return False


def _facts(path: Path) -> list:
    if buckets.is_bucket(path):
        return buckets.hash_object(path)
    require_file(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _difference(directory: Path, name: str, expected: list) -> str:
    try:
        found = _facts(directory / name)
    except FileNotFoundError:
        return f"{name}: no such file"
    except InputError:
        return f"{name}: no such file" if not os.path.exists(directory / name) else f"{name}: not a file"
    except OSError as error:
        return f"{name}: {(error.strerror or 'cannot be read').lower()}"
    if found == expected:
        return ""
    if found[0] != expected[0]:
        return f"{name} has {found[0]} bytes, not {expected[0]}"
    return f"{name} has the right size and another content"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replaces a file at once: whoever reads it, after a kill or a power cut too, finds the old content or the new.

    Also in a bucket.
    """
    if buckets.is_bucket(path):
        buckets.write(path, data.encode() if isinstance(data, str) else data)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its place at the end and vanishes on any failure.

    So do parents that were made for it. For a place in a bucket it is a directory of this machine, whose files are
    brought there at the end. Raises InputError if the place cannot be written or is full.
    """
    if buckets.is_bucket(output):
        with temporary_directory() as directory:
            yield directory
            for name in in_order(directory):
                buckets.upload(directory / name, output / name)
        return
    with _sigterm_raises(), _parents(output):
        directory = _make_sibling(output)
        try:
            yield directory
            directory.rename(output)
        except InputError:
            raise
        except Exception as error:  # ArrayRecord raises RuntimeError, TensorStore ValueError
            number, full = getattr(error, "errno", None), os.strerror(errno.ENOSPC)
            if number in (errno.ENOSPC, errno.EDQUOT) or full in str(error):
                raise InputError(f"{output}: {full.lower()}; free some or choose another place") from error
            if number in (errno.ENOTEMPTY, errno.EEXIST) and getattr(error, "filename2", None) is not None:
                raise InputError(f"{output}: was made by something else in the meantime; nothing is kept") from error
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def cache_directory(given: str = "") -> Path:
    """Where copies of what lies in buckets are kept: the place given, or llada_jax in the user's cache directory."""
    base = Path(given or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "llada_jax")).expanduser()
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{base}: cannot be made ({error.strerror}); choose another config.data.cache_dir") from error
    return base


@contextlib.contextmanager
def temporary_directory(cache: str = "") -> Iterator[Path]:
    """A new directory in `cache_directory`, gone at the end; those that killed processes left go, too."""
    own = _make_sibling(cache_directory(cache) / "run", exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=own))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # another is in it
            own.rmdir()


def write_file(output: Path, data: bytes) -> None:
    """Writes a file that appears at once and whole. Raises InputError if the place cannot be written or is full."""
    with _partial(output) as partial:
        partial.write_bytes(data)
        partial.replace(output)


def require_place(output: Path) -> None:
    """Raises InputError unless a file could be written at `output` now; leaves nothing there."""
    with _partial(output) as partial:
        partial.touch()


@contextlib.contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """A place beside `output`; what is still there in the end vanishes, as do parents made for it."""
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    with _parents(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            if output.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            try:
                yield partial
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{output}: cannot be written ({error.strerror}); choose another place") from error


@contextlib.contextmanager
def _parents(output: Path) -> Iterator[None]:
    """Takes the parents that were not there at first away again, unless they came to hold something."""
    absent = [parent for parent in output.parents if not os.path.lexists(parent)]
    try:
        yield
    finally:
        for parent in absent:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _make_sibling(output: Path, exist_ok: bool = False) -> Path:
    """A directory beside `output`, named for this process; what killed processes left there is removed."""
    owner = f".{output.name}.partial-{socket.gethostname()}-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f"{glob.escape(owner)}*"):
            if not is_alive(left.name.removeprefix(owner)):
                shutil.rmtree(left, ignore_errors=True)
        directory = output.parent / f"{owner}{os.getpid()}"
        directory.mkdir(exist_ok=exist_ok)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{output}: cannot be written ({reason}); choose another place") from error
    return directory


def is_alive(pid: int | str) -> bool:
    """Whether a process of this machine lives; False for what is no process id."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return False
    except PermissionError:  # someone else's, so it lives
        return True
    return True


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets a polite kill unwind the stack as Ctrl-C does, unless someone handles it already."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
