"""The manifest of a prepared dataset: what its directory must hold, checked before any of it is believed.

A directory holds manifest.json, the shards that it names, lengths.npy and checksums.npy (of each row) and a tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax.data.shards import FORMAT
from llada_jax.fields import InputError
from llada_jax.files import LARGEST_JSON, inside, read_json, require_file

KINDS = ("text", "chat")

_AGAIN = "copy the dataset again, or prepare it with tools/prepare_data.py"
_LONGEST_ROW = 2**24
_BEGUN = "inputs.json"  # of a workdir: the files that its run began with
_COMPARED = (
    "manifest.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset, every field that is used later of the right type and size.

    Raises InputError if there is none, and where it is not as `prepare_dataset` writes it.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise InputError(f"{directory}: no dataset there (no manifest.json); prepare it with tools/prepare_data.py")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: its format is not {FORMAT!r}; prepare it with tools/prepare_data.py again")

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"{path}: {what} is not what tools/prepare_data.py writes; {_AGAIN}")

    require(manifest.get("kind") in KINDS, "kind")
    require(_count(manifest.get("row_length"), _LONGEST_ROW) and manifest["row_length"] >= 2, "row_length")
    for name in ("rows", "tokens", "bytes", "documents", "dropped"):
        require(_count(manifest.get(name)), name)
    shards: Any = manifest.get("shards")
    tokenizer: Any = manifest.get("tokenizer")
    require(isinstance(shards, list) and len(shards) > 0, "shards")
    for shard in shards:
        counted = isinstance(shard, dict) and _count(shard.get("rows")) and _count(shard.get("bytes"))
        require(counted and shard["rows"] > 0, "an entry of shards")
        inside(directory, shard.get("file"), str(path))
    require(sum(shard["rows"] for shard in shards) == manifest["rows"], "the number of rows")
    require(isinstance(tokenizer, dict) and isinstance(tokenizer.get("fingerprint"), str), "tokenizer")
    require(_count(tokenizer.get("vocab_size"), 2**31 - 1), "the tokenizer's vocab_size")
    inside(directory, tokenizer.get("file"), str(path))
    return manifest


def check_files(directory: Path, manifest: dict[str, Any]) -> None:
    """Raises InputError for a shard that is not there or has another size, and for another tokenizer."""
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
            raise InputError(f"{path}: {found}; {_AGAIN}")
    tokenizer = directory / manifest["tokenizer"]["file"]
    require_file(tokenizer, LARGEST_JSON)
    if _digest(tokenizer) != manifest["tokenizer"]["fingerprint"]:
        raise InputError(f"{tokenizer}: not the tokenizer that this dataset was made with; {_AGAIN}")


def read_column(path: Path, dtype: type, rows: int) -> np.ndarray:
    """A number for each row, [rows], mapped from an .npy file. Raises InputError if that is not what it holds."""
    require_file(path)
    try:
        column = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"{len(column)} rows of {column.dtype}"
    except Exception as error:  # NumPy raises ValueError, SyntaxError, TypeError and more for damaged headers
        raise InputError(f"{path}: cannot be read ({str(error)[:100]}); {_AGAIN}") from error
    if not isinstance(column, np.ndarray) or column.shape != (rows,) or column.dtype != dtype:
        raise InputError(f"{path.parent}: {path.name} has {found}, the manifest says {rows}; {_AGAIN}")
    return column


def require_unchanged(workdir: Path, directories: Sequence[Path]) -> None:
    """Raises InputError naming the first file of the datasets that is another than when the run in `workdir` began.

    A run that begins stores what there is. Manifests hold the checksums of the shards, and rows have their own: only
    small files are read here. For one process alone.
    """
    found = {}
    for directory in directories:
        for path in filter(Path.is_file, (directory / name for name in _COMPARED)):
            name = path.relative_to(workdir) if path.is_relative_to(workdir) else path.absolute()
            found[str(name)] = _digest(path)
    place = workdir / _BEGUN
    if not place.exists():
        temporary = workdir / f"{_BEGUN}.tmp"
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(place)
        return
    begun = read_json(place)
    for name in sorted(begun.keys() | found.keys()):
        if begun.get(name) != found.get(name):
            what = "is gone" if name not in found else "is new" if name not in begun else "changed"
            raise InputError(
                f"{workdir / name}: {what} since the run in {workdir} began; restore it, or choose another --workdir"
            )


def _count(value: object, most: int = 2**62) -> bool:
    return type(value) is int and 0 <= value <= most


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
