"""Directories of safetensors files: checked before anything is read, read by the slice, written by the tensor.

The safetensors library reads the headers and the slices. Writing is done here.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from llada_jax.fields import InputError
from llada_jax.files import read_text, require_file

DTYPES = {"F32": np.dtype(np.float32), "BF16": jnp.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 2**22  # read at a time: this memory stays in the cache, and is used again
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")

Layout = tuple[str, str, tuple[int, ...]]  # name, dtype ("F32") and shape of a tensor


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: Path
    name: str
    dtype: str  # as the file calls it: "F32"
    shape: tuple[int, ...]

    def chunks(self, index: Sequence[slice], most_bytes: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
        """A part of the tensor, some rows at a time: (rows, counted from the beginning of the part; their values).

        index: a slice with start and stop for each axis. Only the bytes of the part are read from the disk, at most so
        many at a time, but a row at least.
        """
        rows, *rest = index
        row_bytes = math.prod(s.stop - s.start for s in rest) * DTYPES[self.dtype].itemsize
        step = max(1, (most_bytes or _CHUNK_BYTES) // max(1, row_bytes))
        with _opened(self.path) as file:
            part = file.get_slice(self.name)
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                yield slice(start - rows.start, stop - rows.start), part[(slice(start, stop), *rest)]

    @property
    def whole(self) -> tuple[slice, ...]:
        """The index of all of it."""
        return tuple(slice(0, n) for n in self.shape)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose dtype is named as in the files."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def read_directory(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's files by name; reads their headers alone.

    Raises InputError for a missing or unlisted shard, a tensor that two files hold or that is not where the index says,
    and whatever `read_header` refuses.
    """
    present = {path.name: path for path in sorted(directory.glob("*.safetensors"))}
    if not present:
        raise InputError(f"{directory}: no .safetensors files in it")
    index = _read_index(directory / INDEX) if os.path.lexists(directory / INDEX) else None
    listed = set(index.values()) if index is not None else _complete(present)
    if missing := sorted(listed - set(present)):
        raise InputError(f"{directory}: shard {some(missing)} is missing; download it again")
    if extra := sorted(set(present) - listed):
        raise InputError(f"{directory}: {some(extra)} is not among the files of {INDEX}; remove one or the other")
    found: dict[str, Stored] = {}
    for file, path in present.items():
        for name, tensor in read_header(path).items():
            if name in found:
                raise InputError(f"{directory}: tensor {some([name])} is in {found[name].path.name} and in {file}")
            if index is not None and index.get(name) != file:
                place = index.get(name, "no file")
                raise InputError(f"{path}: holds tensor {some([name])}, which {INDEX} puts in {place}")
            found[name] = tensor
    if index is not None and (absent := [name for name in index if name not in found]):
        raise InputError(f"{directory}: {INDEX} lists {some(absent)}, which no file holds")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, whose bytes the library has compared with the size of the file.

    Raises InputError for a file that is truncated, corrupt, or holds a dtype other than F32, BF16 and F16.
    """
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():
            part = file.get_slice(name)
            tensors[name] = Stored(path, name, part.get_dtype(), tuple(part.get_shape()))
            if tensors[name].dtype not in DTYPES:
                supported = ", ".join(DTYPES)
                raise InputError(
                    f"{path}: tensor {some([name])} has dtype {part.get_dtype()}; supported are {supported}"
                )
    return tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as the library opens it, which checks the header against the size of the file. Raises InputError."""
    require_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")[:200]
        raise InputError(f"{path}: not a safetensors file, truncated or corrupt ({why}); download it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says of itself besides its tensors."""
    with _opened(path) as file:
        return file.metadata() or {}


def write_file(
    path: Path,
    tensors: Sequence[Layout],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a file whose tensors' contents come one by one, in the order of `tensors`.

    If that is `file_order`, the bytes are those that the safetensors library would write. The library itself takes all
    tensors of a file at once, which for a model as large as the memory are too many.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, dtype, shape), array in zip(tensors, arrays, strict=True):
            assert array.dtype == DTYPES[dtype] and math.prod(shape) == array.size, name
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def shards(tensors: Sequence[Layout], most_bytes: int) -> tuple[dict[str, list[Layout]], str]:
    """The files of a checkpoint, with what each holds in its order, and the text of their index.

    Files are filled in the order of `tensors`, by the function that transformers calls for it.
    """
    layout = {name: (name, dtype, shape) for name, dtype, shape in tensors}
    split = split_state_dict_into_shards_factory(
        layout, get_storage_size=lambda tensor: nbytes(*tensor[1:]), max_shard_size=most_bytes,
        filename_pattern="model{suffix}.safetensors",
    )  # fmt: skip
    files = {file: file_order(layout[name] for name in names) for file, names in split.filename_to_tensors.items()}
    index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
    return files, json.dumps(index, indent=2) + "\n"


def file_order(tensors: Iterable[Layout]) -> list[Layout]:
    """The order in which the safetensors library lays out tensors: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda tensor: (-DTYPES[tensor[1]].itemsize, tensor[0]))


def _complete(present: dict[str, Path]) -> set[str]:
    """The files that a directory without an index must hold: all there are, and every shard of a numbered set."""
    listed = set(present)
    for match in filter(None, map(_SHARD.fullmatch, present)):
        stem, _, count = match.groups()
        if int(count) <= 10_000:
            listed |= {f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))}
    return listed


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(read_text(path), object_pairs_hook=_no_duplicates)
        files = dict(index["weight_map"])
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = str(error)[:120] or type(error).__name__
        raise InputError(f"{path}: not an index of shards ({why}); download it again") from error
    if not files or not all(isinstance(file, str) and file.endswith(".safetensors") for file in files.values()):
        raise InputError(f"{path}: not an index of shards (weight_map must give each tensor a .safetensors file)")
    return files


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def some(names: Sequence[str]) -> str:
    """The first few names, for a message of one line."""
    shown = [" ".join(name[:100].split()) for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
