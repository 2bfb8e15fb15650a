"""Copies on this machine of what lies in a bucket: the small files of a run's workdir, and data and models, once."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llada_jax.fields import InputError, RunFailed
from llada_jax.files import atomic_directory, cache_directory, hash_file, in_order, read_json, temporary_directory
from llada_jax.storage import buckets

_THREADS = 8
_COPIED = ("tokenizer/", "data/")  # of a workdir, beside its own .json and .jsonl
_NOT_COPIED = ("lease.json",)


class Workdir:
    """The workdir of a run. `remote` is what the user named, and holds checkpoints/ and lease.json.

    All else (config, notes, tokenizer, prepared data, metrics, events, TensorBoard's files, profiles) is read and
    written in `local`: the same directory, or for a bucket a copy on this machine, which `push` brings there.
    """

    def __init__(self, remote: Path, local: Path | None = None):
        self.remote, self.local = remote, local or remote
        self.checkpoints = remote / "checkpoints"
        self._pushed: dict[str, tuple[int, int]] = {}  # size and time of change of what the bucket has, by name

    def __str__(self) -> str:
        return str(self.remote)

    @property
    def is_mirror(self) -> bool:
        return self.local is not self.remote

    def fetch(self, folder: str = "") -> None:
        """Brings the files of the run, or those of one folder, from the bucket; no checkpoints, nothing to look at.

        Prepared data whose manifest.json is not there, which comes last, is left out.
        """
        if not self.is_mirror:
            return
        found = buckets.files_below(self.remote)
        names = [name for name in found if _belongs(name) and name.startswith(folder)]
        if "data/manifest.json" not in found:
            names = [name for name in names if not name.startswith("data/")]

        def fetch_one(name: str) -> None:
            buckets.download(self.remote / name, self.local / name)
            self._pushed[name] = _state(self.local / name)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch_one, names))

    def push(self) -> None:
        """Makes the bucket hold what `local` holds: uploads what is new or changed, removes what is gone.

        For one process alone. Raises RunFailed while the bucket is away.
        """
        if not self.is_mirror:
            return
        names = [name for name in in_order(self.local) if not name.endswith(".tmp")]
        for name in self._pushed.keys() - set(names):
            buckets.remove(self.remote / name)
            del self._pushed[name]
        for name in names:
            state = _state(self.local / name)
            if self._pushed.get(name) != state:
                buckets.upload(self.local / name, self.remote / name)
                self._pushed[name] = state


@contextlib.contextmanager
def opened(workdir: str | os.PathLike, cache: str = "") -> Iterator[Workdir]:
    """The workdir that a user named; cache: where copies are kept, "": `files.cache_directory`.

    Raises InputError for a bucket that is not there, or that the credentials do not open.
    """
    remote = buckets.path_of(workdir)
    if not buckets.is_bucket(remote):
        yield Workdir(remote)
        return
    buckets.require_reachable(remote)
    with temporary_directory(cache) as local:
        yield Workdir(remote, local)


def _belongs(name: str) -> bool:
    """Whether a file is one that a run which continues reads."""
    own = "/" not in name and name.endswith((".json", ".jsonl")) and name not in _NOT_COPIED
    return own or name.startswith(_COPIED)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def copied(place: str | os.PathLike, cache: str = "") -> Path:
    """The path itself, or for one in a bucket its copy on this machine, made anew only when something changed there.

    Of a workdir, what lies beside its checkpoints. Shards of prepared data are compared with the SHA-256 of their
    manifest. Raises InputError if there is nothing.
    """
    path = buckets.path_of(place)
    if not buckets.is_bucket(path):
        return path
    try:
        found = buckets.files_below(path)
        name = ""
        if not found and buckets.exists(path):
            path, name = path.parent, path.name
            found = {name: buckets.files_below(path)[name]}
    except FileNotFoundError as error:
        raise InputError(f"{place}: there is no such bucket; correct the name") from error
    if any(name.startswith("checkpoints/") for name in found):
        found = {name: info for name, info in found.items() if _belongs(name) and not name.startswith("data/")}
    if not found:
        raise InputError(f"{place}: nothing is there; correct the address")
    if bad := [name for name in found if not buckets.leads_inside(name)]:
        raise InputError(f"{place}: has an object named {bad[0]!r}; remove it")
    return _kept_copy(path, found, cache_directory(cache)) / name


def _kept_copy(path: Path, found: dict[str, dict[str, Any]], cache: Path) -> Path:
    """The directory of the cache with these files; one process of this machine copies, the others wait for it."""
    facts = {name: [info["size"], info.get("etag") or info.get("ETag")] for name, info in found.items()}
    key = hashlib.sha256(json.dumps([str(path), len(found) == 1 and list(found)]).encode()).hexdigest()[:16]
    target, record = cache / f"{key}-{path.name}", cache / f"{key}.json"
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (record.exists() and target.is_dir() and read_json(record) == facts):
            record.unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            _copy(path, {name: size for name, (size, _) in facts.items()}, target)
            record.write_text(json.dumps(facts))
    return target


def _copy(path: Path, sizes: dict[str, int], target: Path) -> None:
    total = sum(sizes.values())
    print(f"{path}: copying {total / 1e9:.3g} GB to {target}", file=sys.stderr)
    with atomic_directory(target) as made, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def copy_one(name: str) -> None:
            buckets.download(path / name, made / name)
            size = (made / name).stat().st_size
            if size != sizes[name]:
                raise RunFailed(f"{path / name}: {size} of {sizes[name]} bytes arrived; the same command tries again")
            bar.update(size)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(copy_one, sizes))
        _compare_shards(path, made)


def _compare_shards(path: Path, made: Path) -> None:
    """Raises InputError for a shard of prepared data that is not as its manifest says."""
    for manifest in made.rglob("manifest.json"):
        place = path / manifest.parent.relative_to(made).as_posix()
        shards = read_json(manifest).get("shards")
        for shard in shards if isinstance(shards, list) else []:
            file, expected = manifest.parent / str(shard.get("file")), shard.get("sha256")
            if expected and file.is_file() and hash_file(file) != expected:
                raise InputError(f"{place / file.name}: not as manifest.json says; prepare or copy it again")
