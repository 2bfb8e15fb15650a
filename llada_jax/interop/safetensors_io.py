"""safetensors files, streamed: headers that are checked before anything is believed, tensors mapped one at a time.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors, "Format").
"""

import dataclasses
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from llada_jax.fields import InputError
from llada_jax.files import read_text

DTYPES = {"F32": np.dtype(np.float32), "BF16": jnp.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_READ_BYTES = 2**24  # at a time
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor where it lies on the disk."""

    path: Path
    dtype: str  # as the file calls it: "F32"
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def map(self) -> np.ndarray:
        """The tensor, read from the disk where it is touched; the memory is given back with the array."""
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)

    def read_into(self, out: np.ndarray) -> None:
        """Fills contiguous memory with the whole tensor: read, which is two to ten times as fast as mapping it."""
        rest = out.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while len(rest):
                count = file.readinto(rest[:_READ_BYTES])
                if not count:
                    raise InputError(f"{self.path}: truncated while it was read")
                rest = rest[count:]


def read_directory(directory: Path) -> dict[str, Stored]:
    """Every tensor of the directory's files by name.

    Raises InputError for a missing or unlisted shard, a tensor that two files hold or that is not where the index says,
    and whatever `read_header` refuses.
    """
    present = {path.name: path for path in sorted(directory.glob("*.safetensors"))}
    if not present:
        raise InputError(f"{directory}: no .safetensors files in it")
    index = _read_index(directory / INDEX) if (directory / INDEX).exists() else None
    listed = set(index.values()) if index is not None else _complete(present)
    if missing := sorted(listed - set(present)):
        raise InputError(f"{directory}: shard {some(missing)} is missing; download it again")
    if extra := sorted(set(present) - listed):
        raise InputError(f"{directory}: {some(extra)} is not among the files of {INDEX}; remove one or the other")
    found: dict[str, Stored] = {}
    for file, path in present.items():
        for name, tensor in read_header(path).items():
            if name in found:
                raise InputError(f"{directory}: tensor {name} is in {found[name].path.name} and in {file}")
            if index is not None and index.get(name) != file:
                raise InputError(f"{path}: holds tensor {name}, which {INDEX} puts in {index.get(name, 'no file')}")
            found[name] = tensor
    if index is not None and (absent := [name for name in index if name not in found]):
        raise InputError(f"{directory}: {INDEX} lists {some(absent)}, which no file holds")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, after every promise of its header was held against the size of the file.

    Raises InputError for a file that is truncated, corrupt, or holds a dtype other than F32, BF16 and F16.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a file, or a link to one that is gone; download it again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise InputError(f"{path}: not a safetensors file, or truncated ({size} bytes, header of {length})")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is corrupt ({_brief(error)})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is corrupt (not an object)")
    header.pop("__metadata__", None)
    begin, tensors = 8 + length, {}
    for name, (dtype, shape, first, last) in sorted(
        ((name, _entry(path, name, entry)) for name, entry in header.items()), key=lambda item: item[1][2:]
    ):
        tensors[name] = Stored(path, dtype, shape, 8 + length + first)
        if 8 + length + first != begin or last - first != tensors[name].nbytes:
            raise InputError(f"{path}: its header is corrupt (tensor {name}: bytes {first} to {last}, shape {shape})")
        begin = 8 + length + last
    if begin != size:
        raise InputError(f"{path}: truncated or corrupt (its tensors end at byte {begin}, the file has {size})")
    return tensors


def write_file(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes tensors (name, dtype, shape), whose contents come one by one in the same order.

    Sorted by dtype and name as the safetensors library does, the file is the one that it would write.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
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


def file_order(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The order in which the safetensors library lays out (name, dtype, shape): wide dtypes first, then by name."""
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
        raise InputError(f"{path}: not an index of shards ({_brief(error)})") from error
    if not files or not all(isinstance(file, str) and file.endswith(".safetensors") for file in files.values()):
        raise InputError(f"{path}: not an index of shards (weight_map must give each tensor a .safetensors file)")
    return files


def _entry(path: Path, name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of one tensor's header."""
    natural = lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63  # noqa: E731
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and len(shape) <= 8 and all(map(natural, (*shape, first, last)))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{path}: its header is corrupt (tensor {name})")
    if dtype not in DTYPES:
        raise InputError(f"{path}: tensor {name} has dtype {dtype}; supported are {', '.join(DTYPES)}")
    return dtype, shape, first, last


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _brief(error: Exception) -> str:
    return str(error)[:120] or type(error).__name__
