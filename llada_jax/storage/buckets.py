"""Buckets (gs://, s3://): their paths, and the few operations that object stores have, which fail loudly.

fsspec's `exists` and `isfile`, and those of etils.epath with them, answer no when the network fails: whoever removes
what is incomplete must not ask them. etils.epath is used for names only. What fails is tried again for a while.
"""

import functools
import hashlib
import logging
import os
import posixpath
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib import parse

from llada_jax.fields import InputError, RunFailed

PATIENCE_SECONDS = 120.0  # for which a bucket may be away
_EXTRAS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # of pyproject.toml, with the library, by scheme
_CHUNK_BYTES = 2**25
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")

T = TypeVar("T")


def is_bucket(place: object) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in str(place)


def path_of(place: str | os.PathLike) -> Path:
    """The path that a user gave: of this machine, or in a bucket; of the latter, `/`, name and parent work, and Orbax.

    Raises InputError for an address that is none of a bucket, and where the library for it is not installed.
    """
    text = os.fspath(place)
    if not is_bucket(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme not in _EXTRAS or not re.fullmatch(r"[\w.-]{3,}(/.*)?", rest):
        raise InputError(f"{text}: is no gs://BUCKET/NAME or s3://BUCKET/NAME")
    _file_system(scheme)
    if scheme == "s3":
        _let_orbax_write_to_s3()
    from etils import epath

    path: Any = epath.Path(text.rstrip("/"))
    return path


def files_below(directory: Path) -> dict[str, dict[str, Any]]:
    """{name relative to the directory: what the bucket says of it, such as "size"}; {} if there is nothing.

    Raises FileNotFoundError if there is no such bucket. The same file has the same entry as long as nobody replaces it.
    """
    start = str(directory).partition("://")[2] + "/"
    found = _patiently(directory, lambda fs: fs.find(str(directory), detail=True))
    files = {name: info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")}
    return {name.removeprefix(start): info for name, info in files.items() if name.startswith(start)}


def exists(path: Path) -> bool:
    """Whether there is an object of that name."""
    try:
        return _patiently(path, lambda fs: fs.info(str(path)))["type"] == "file"
    except FileNotFoundError:
        return False


def read(path: Path) -> bytes:
    """An object as a whole. Raises FileNotFoundError if there is none."""
    return _patiently(path, lambda fs: fs.cat_file(str(path)))


def write(path: Path, data: bytes) -> None:
    """Replaces an object at once: whoever reads it finds the old content or the new."""
    _patiently(path, lambda fs: fs.pipe_file(str(path), data))


def remove(path: Path) -> None:
    """Removes one object, if it is there."""
    try:
        _patiently(path, lambda fs: fs.rm_file(str(path)))
    except FileNotFoundError:
        pass  # by an attempt whose answer was lost, say


def remove_below(directory: Path, first: str = "") -> None:
    """Removes all objects below a directory, that of the name `first` before the others."""
    names = sorted(files_below(directory), key=lambda name: name != first)
    for name in names:
        remove(directory / name)


def hash_object(path: Path) -> list:
    """[bytes, SHA-256] of an object, read in pieces. Raises FileNotFoundError if there is none."""
    size, sha = _patiently(path, lambda fs: fs.info(str(path)))["size"], hashlib.sha256()
    for start in range(0, size, _CHUNK_BYTES):
        end = min(start + _CHUNK_BYTES, size)
        sha.update(_patiently(path, lambda fs, start=start, end=end: fs.cat_file(str(path), start=start, end=end)))
    return [size, sha.hexdigest()]


def upload(local: Path, path: Path) -> None:
    """Puts a file into the bucket, whole."""
    _patiently(path, lambda fs: fs.put_file(str(local), str(path)))


def download(path: Path, local: Path) -> None:
    """Copies an object to a file, in a directory that is made if need be. Raises FileNotFoundError if there is none."""
    local.parent.mkdir(parents=True, exist_ok=True)
    _patiently(path, lambda fs: fs.get_file(str(path), str(local)))


def leads_inside(name: str) -> bool:
    """Whether the name of an object, relative to a directory, stays in that."""
    return posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."


def require_reachable(directory: Path) -> None:
    """Raises InputError if the bucket is not there, or may not be listed."""
    try:
        files_below(directory / "lease.json")
    except FileNotFoundError as error:
        raise InputError(f"{directory}: there is no such bucket; make it, or correct the name") from error


@functools.cache
def _file_system(scheme: str) -> Any:
    """fsspec's, without its cache of listings, which would hide what other machines do; of Orbax' and etils', too."""
    import fsspec
    import fsspec.config

    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for one more permission, and logs
    for name in _EXTRAS:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    for name in ("gcsfs", "s3fs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # tracebacks of what is raised as well
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        extra, library = _EXTRAS[scheme]
        raise InputError(f"{scheme}:// needs {library}; pip install 'llada_jax[{extra}]'") from error


def _patiently(path: Path, work: Callable[[Any], T]) -> T:
    """What `work` makes of the file system; tried again as long as the bucket is away, at most PATIENCE_SECONDS.

    Raises FileNotFoundError, InputError where the user may not do that, and RunFailed after that time.
    """
    fs, end, pause = _file_system(str(path).partition("://")[0]), time.monotonic() + PATIENCE_SECONDS, 1.0
    while True:
        try:
            return work(fs)
        except (FileNotFoundError, TypeError, AttributeError, AssertionError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if _is_refused(error):
                raise InputError(
                    f"{path}: access refused ({reason}); look at the credentials and their rights"
                ) from error
            if time.monotonic() + pause > end:
                raise RunFailed(f"{path}: cannot be reached ({reason}); the same command goes on from there") from error
        if pause == 1.0:
            print(f"{path}: not reached ({reason}); trying again for {PATIENCE_SECONDS:.0f} s", file=sys.stderr)
        time.sleep(pause)
        pause = min(2 * pause, 16.0)


def _is_refused(error: Exception) -> bool:
    code = getattr(error, "code", None)
    refused = isinstance(error, PermissionError) or code in (401, 403) or "Forbidden" in str(error)
    return refused or type(error).__name__ in _NO_CREDENTIALS


@functools.cache
def _let_orbax_write_to_s3() -> None:
    """Orbax 0.12 refuses s3:// for arrays ("path should be absolute"), which TensorStore could write.

    What it does for gs:// is done for both; to be removed with the version of Orbax that knows S3.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    of_gcs = gcs_utils.get_kvstore_for_gcs

    def key_value_store(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return of_gcs(path)
        url = parse.urlparse(path)
        spec: dict[str, Any] = {"driver": "s3", "bucket": url.netloc, "path": url.path.lstrip("/")}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint} if endpoint else {}
        spec |= {"aws_region": region} if region else {}
        if "AWS_ACCESS_KEY_ID" in os.environ:  # else it looks for files first, and logs that there are none
            spec["aws_credentials"] = {"type": "environment"}
        return spec

    gcs_utils.get_kvstore_for_gcs = key_value_store
    tensorstore_utils._use_gcs_driver = is_bucket
    tensorstore_utils._normalize_path = lambda path: re.sub(r"^(gs|s3):/", r"\1://", os.path.normpath(path))
