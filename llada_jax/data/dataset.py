"""A prepared dataset on disk: its manifest, its shards of records and how they are written and read.

A directory holds manifest.json, the shards that it names, lengths.npy and checksums.npy (of each row) and a tokenizer.
A record is the bytes of its fields, little-endian, in the order of the manifest.
"""

import bisect
import contextlib
import itertools
import json
import math
import os
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llada_jax.data import packing
from llada_jax.data.kind import LONGEST_ROW, Field, Record
from llada_jax.fields import InputError
from llada_jax.files import LARGEST_JSON, hash_file, inside, read_json, require_file

FORMAT = "llada_jax.rows.v2"

_AGAIN = "copy the dataset again, or prepare it with tools/prepare_data.py"
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float16", "float32", "float64")
_LARGEST_RECORD = 2**28  # bytes
_BEGUN = "inputs.json"  # of a workdir: the files that its run began with
_COMPARED = (
    "manifest.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
# One record a group for random access; zstd:1 quarters the size at 50M tokens/s read by a core.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_STAND_IN_SEED = 0xDA3A6E  # fixed: a damaged row has the same stand-in on every host and in every run
_MOST_STAND_INS = 100  # tried for one row, before the dataset is given up


class DamagedRow(InputError):
    """A row that is not as it was written."""


class RowSource:
    """A prepared dataset by row: `source[i]` is a record, each field a NumPy array or scalar of its dtype.

    Thread-safe; made by `open_dataset`. Raises DamagedRow for a record that is not as it was written.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.lengths = read_column(path / "lengths.npy", np.int32, manifest["rows"])  # what is not padding
        self._checksums = read_column(path / "checksums.npy", np.uint32, manifest["rows"])
        self.kind: str = manifest["kind"]
        self.row_length: int = manifest["row_length"]
        self.fields = fields_of(manifest)
        self._dtype = record_dtype(self.fields)
        # Tokens that a loss may ask for. Datasets of dialogues from before it was counted do not have it.
        unknown = manifest["tokens"] if self.kind == "text" else None
        self.scored_tokens: int | None = manifest.get("scored_tokens", unknown)
        self.tokenizer_path = path / manifest["tokenizer"]["file"]
        shards = [_Shard(str(path / shard["file"]), 0, shard["rows"], shard["rows"]) for shard in manifest["shards"]]
        self._records = ArrayRecordDataSource(shards)  # pyright: ignore[reportArgumentType]
        self._ends = list(itertools.accumulate(shard["rows"] for shard in manifest["shards"]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Record:
        try:
            row = decode_record(self._records[index], self.fields, self._dtype, int(self._checksums[index]))
            if row["length"] != self.lengths[index]:
                raise ValueError(f"its length {row['length']} is {self.lengths[index]} in lengths.npy")
        except (RuntimeError, OSError, ValueError) as error:
            shard = bisect.bisect_right(self._ends, index)
            file = self.path / self.manifest["shards"][shard]["file"]
            record = index - (self._ends[shard - 1] if shard else 0)
            reason = " ".join(str(error).split())[:200]
            raise DamagedRow(f"{file}: record {record} cannot be read ({reason}); copy the file again") from error
        return row

    def stand_in(self, index: int) -> int:
        """The readable row that takes the place of a damaged one: a function of its index and the files alone."""
        for attempt in range(_MOST_STAND_INS):
            draw = packing.uniform(_STAND_IN_SEED, attempt, np.asarray([index]))[0]
            try:
                self[other := int(draw * len(self))]
                return other
            except DamagedRow:
                pass  # the next one
        raise InputError(f"{self.path}: {_MOST_STAND_INS} rows drawn from it cannot be read; copy the dataset again")


class _Shard(NamedTuple):
    """ArrayRecord's FileInstruction: with the count known, files are opened only when needed."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_dataset(path: str | os.PathLike) -> RowSource:
    """Opens what `prepare_dataset` wrote; InputError if it is missing, incomplete or foreign."""
    path = Path(path)
    manifest = read_manifest(path)
    check_files(path, manifest)
    return RowSource(path, manifest)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset, every field that is used later of the right type and size.

    Raises InputError if there is none, and where it is not as `prepare_dataset` writes it.
    """
    path = directory / "manifest.json"
    if not os.path.exists(path):  # False for names that no file can have, too
        raise InputError(f"{directory}: no dataset there (no manifest.json); prepare it with tools/prepare_data.py")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: its format is not {FORMAT!r}; prepare it with tools/prepare_data.py again")

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"{path}: {what} is not what tools/prepare_data.py writes; {_AGAIN}")

    require(isinstance(manifest.get("kind"), str), "kind")
    require(_count(manifest.get("row_length"), LONGEST_ROW) and manifest["row_length"] >= 2, "row_length")
    for name in ("rows", "tokens", "bytes", "documents", "dropped"):
        require(_count(manifest.get(name)), name)
    require(_count(manifest.get("scored_tokens", 0)), "scored_tokens")
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
    require(_are_fields(manifest.get("fields", {"length": {"dtype": "int32", "shape": []}})), "fields")
    return manifest


def fields_of(manifest: dict[str, Any]) -> dict[str, Field]:
    """The fields of the records, in the order of their bytes."""
    if "fields" not in manifest:  # written when there were rows of tokens only
        return packing.row_fields(manifest["row_length"], manifest["tokenizer"]["vocab_size"])
    return {
        name: Field(field["dtype"], tuple(field["shape"]), field.get("below"))
        for name, field in manifest["fields"].items()
    }


def _are_fields(fields: Any) -> bool:
    if not isinstance(fields, dict) or not all(name.isidentifier() and _is_field(fields[name]) for name in fields):
        return False
    length = fields.get("length", {})
    size = sum(np.dtype(field["dtype"]).itemsize * math.prod(field["shape"]) for field in fields.values())
    return (length.get("dtype"), length.get("shape")) == ("int32", []) and size <= _LARGEST_RECORD


def _is_field(field: Any) -> bool:
    if not isinstance(field, dict) or field.get("dtype") not in _DTYPES or not isinstance(field.get("shape"), list):
        return False
    dtype, sizes, below = np.dtype(field["dtype"]), field["shape"], field.get("below")
    bounded = below is None or (dtype.kind in "iu" and _count(below, 2 ** (8 * dtype.itemsize - 1)))
    return bounded and len(sizes) <= 8 and all(_count(n, LONGEST_ROW) and n > 0 for n in sizes)


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
    if hash_file(tokenizer) != manifest["tokenizer"]["fingerprint"]:
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

    Compared is the content, in the order of the datasets: where they lie may change. A run that begins stores the
    hashes of what there is. Manifests hold those of the shards, and rows have their own: only small files are read
    here. For one process alone.
    """
    found = {
        str(directory.absolute() / name): hash_file(directory / name)
        for directory in directories
        for name in _COMPARED
        if os.path.exists(directory / name)
    }
    place = workdir / _BEGUN
    if not place.exists():
        temporary = workdir / f"{_BEGUN}.tmp"
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(place)
        return
    for (old_directory, old), (directory, new) in itertools.zip_longest(
        _by_directory(read_json(place)), _by_directory(found), fillvalue=("", {})
    ):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                what = "is gone" if name not in new else "is new" if name not in old else "changed"
                raise InputError(
                    f"{workdir / (directory or old_directory) / name}: {what} since the run in {workdir} began; "
                    "restore it, or choose another --workdir"
                )


def _by_directory(files: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The files of each directory, in order, by name."""
    groups = itertools.groupby(files, os.path.dirname)
    return [(directory, {os.path.basename(path): files[path] for path in group}) for directory, group in groups]


def _count(value: object, most: int = 2**62) -> bool:
    return type(value) is int and 0 <= value <= most


class ShardWriter:
    """Writes records into shards of `rows_per_shard`; `lengths.npy` and `checksums.npy` (CRC-32 of each) at the end."""

    def __init__(self, directory: Path, fields: dict[str, Field], rows_per_shard: int):
        directory.mkdir(exist_ok=True)
        self._directory, self._fields, self._rows_per_shard = directory, fields, rows_per_shard
        self._dtype = record_dtype(fields)
        self._writer: ArrayRecordWriter | None = None
        self._lengths, self._checksums = array("i"), array("I")
        self._shards: list[dict[str, Any]] = []

    def write(self, record: Record):
        """Appends a record, which must have the fields that the writer was made with."""
        writer = self._writer or ArrayRecordWriter(str(self._path()), _WRITER_OPTIONS)
        self._writer = writer
        data = encode_record(record, self._dtype)
        writer.write(data)
        self._lengths.append(int(record["length"]))
        self._checksums.append(zlib.crc32(data))
        if len(self._lengths) % self._rows_per_shard == 0:
            self._finish_shard()

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; returns the rows, tokens, fields and shards of the manifest."""
        self._finish_shard()
        for i, shard in enumerate(self._shards):
            shard["file"] = f"rows-{i:05d}-of-{len(self._shards):05d}.arrayrecord"
            self._path(i).rename(self._directory / shard["file"])
        lengths = np.asarray(self._lengths, np.int32)
        np.save(self._directory / "lengths.npy", lengths)
        np.save(self._directory / "checksums.npy", np.asarray(self._checksums, np.uint32))
        return {
            "rows": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "fields": {name: {**f._asdict(), "shape": list(f.shape)} for name, f in self._fields.items()},
            "shards": self._shards,
        }

    def close(self):
        """Lets go of an unfinished shard, after a failure."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # it may fail for the reason we are stopping for
                self._writer.close()
            self._writer = None

    def _path(self, shard: int | None = None) -> Path:
        return self._directory / f"rows-{len(self._shards) if shard is None else shard:05d}.partial"

    def _finish_shard(self):
        if self._writer is None:
            return
        path, rows = self._path(), len(self._lengths) - sum(shard["rows"] for shard in self._shards)
        self._writer.close()
        self._writer = None
        reader = ArrayRecordReader(str(path))
        written = reader.num_records()
        reader.close()
        if written != rows:
            raise RuntimeError(f"{path}: {written} of {rows} records arrived on disk")
        facts = {"rows": rows, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        self._shards.append({"file": path.name, **facts})


def record_dtype(fields: dict[str, Field]) -> np.dtype:
    """The bytes of a record: its fields one after the other, little-endian."""
    return np.dtype([(name, np.dtype(field.dtype).newbyteorder("<"), field.shape) for name, field in fields.items()])


def encode_record(record: Record, dtype: np.dtype) -> bytes:
    names = dtype.names or ()
    assert set(record) == set(names), f"a record of {sorted(record)} in a dataset of {sorted(names)}"
    values = np.empty((), dtype)
    for name in names:
        assert np.shape(record[name]) == values[name].shape, f"{name} has shape {np.shape(record[name])}"
        values[name] = record[name]
    return values.tobytes()


def decode_record(data: bytes, fields: dict[str, Field], dtype: np.dtype, checksum: int) -> dict[str, Any]:
    """The fields as arrays (views) or NumPy scalars. Raises ValueError for other bytes than were written."""
    if len(data) != dtype.itemsize or zlib.crc32(data) != checksum:
        raise ValueError("its bytes are not those that were written")
    values = np.frombuffer(data, dtype)[0]
    record = {name: values[name] for name in fields}
    for name, field in fields.items():
        if field.below is not None and not _all_below(record[name], field.below):
            raise ValueError(f"its {name} are not from 0 to below {field.below}")
    return record


def _all_below(x: Any, below: int) -> bool:
    """Whether the integers of x, an array or a scalar, are from 0 to below `below`."""
    if x.ndim == 0:
        return 0 <= x < below
    return x.view(f"u{x.itemsize}").max() < below  # as unsigned numbers, negative ones are above all that it may be
