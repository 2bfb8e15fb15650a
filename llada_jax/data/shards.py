"""How rows lie on disk: the record and the shards of a dataset.

A record is little-endian int32: tokens_L, segment_ids_L, prompt_length, length.
"""

import contextlib
import hashlib
import zlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

FORMAT = "llada_jax.rows.v2"

# One record a group for random access; zstd:1 quarters the size at 50M tokens/s read by a core.
_WRITER_OPTIONS = "group_size:1,zstd:1"


class ShardWriter:
    """Writes rows into shards of `rows_per_shard`; `lengths.npy` and `checksums.npy` (CRC-32 of each) at the end."""

    def __init__(self, directory: Path, rows_per_shard: int):
        directory.mkdir(exist_ok=True)
        self._directory, self._rows_per_shard = directory, rows_per_shard
        self._writer: ArrayRecordWriter | None = None
        self._lengths, self._checksums = array("i"), array("I")
        self._shards: list[dict[str, Any]] = []

    def write(self, tokens_L: np.ndarray, segment_ids_L: np.ndarray, prompt_length: int, length: int):
        """Appends a row; `length` counts its positions that are not padding."""
        writer = self._writer or ArrayRecordWriter(str(self._path()), _WRITER_OPTIONS)
        self._writer = writer
        record = np.concatenate([tokens_L, segment_ids_L, [prompt_length, length]]).astype("<i4").tobytes()
        writer.write(record)
        self._lengths.append(length)
        self._checksums.append(zlib.crc32(record))
        if len(self._lengths) % self._rows_per_shard == 0:
            self._finish_shard()

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; returns the rows, tokens and shards of the manifest."""
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
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": digest})


def decode_record(record: bytes, row_length: int, checksum: int, vocab_size: int) -> dict[str, Any]:
    """tokens and segment_ids int32 [L] (views), prompt_length and length. Raises ValueError for anything else."""
    if len(record) != 8 * row_length + 8 or zlib.crc32(record) != checksum:
        raise ValueError("its bytes are not those that were written")
    values = np.frombuffer(record, "<i4")
    row = {
        "tokens": values[:row_length],
        "segment_ids": values[row_length : 2 * row_length],
        "prompt_length": int(values[-2]),
        "length": int(values[-1]),
    }
    if values.min() < 0 or row["tokens"].max() >= vocab_size or not row["prompt_length"] <= row["length"] <= row_length:
        raise ValueError("it holds no row of this tokenizer and length")
    return row
