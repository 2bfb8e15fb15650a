"""Files of text or dialogues become a directory of rows: ArrayRecord shards, lengths, tokenizer and manifest.

A record is little-endian int32: tokens_L, segment_ids_L, prompt_length, length. The directory appears
complete or not at all.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tqdm
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llada_jax.config import InputError
from llada_jax.data import rows, sources
from llada_jax.data.tokenizer import Messages, Tokenizer, load_tokenizer

FORMAT = "llada_jax.rows.v1"
KINDS = ("text", "chat")
OVERLONG = ("error", "drop")

_CHUNK_BYTES = 2**20  # of text, the unit of work of one process
_SHARD_BYTES = 2**28  # before compression
# One record a group for random access; zstd:1 quarters the size and still reads 50M tokens/s a core.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_VALIDATION_SEED = 0x5EED  # fixed: a document stays on its side when anything else changes

T = TypeVar("T")
R = TypeVar("R")
Document = tuple[str, Any]  # where it stands ("file:line"); its text or messages
Example = tuple[int, np.ndarray, int]  # index of the document, its ids, length of the prompt


def prepare_dataset(
    output: str | os.PathLike,
    *,
    kind: str = "text",
    files: str | Sequence[str] | None = None,
    texts: Iterable[str] | None = None,
    dialogues: Iterable[Messages] | None = None,
    tokenizer: Tokenizer,
    row_length: int,
    packing: str = "concatenate",
    documents: str = "file",
    overlong: str = "error",
    validation_fraction: float = 0.0,
    rows_per_shard: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the rows of `files` (or of `texts`, `dialogues` in memory) to `output`; returns the manifest.

    `packing` and `documents` (what a document of a text file is) concern kind "text", `overlong`
    (a row of more than `row_length` tokens is an "error" or "drop"ped) kind "chat". A share of the
    documents, `validation_fraction`, goes to `output/validation`, a dataset of the same form. The
    rows do not depend on `workers`. An existing `output` is reused if it is this same preparation.
    Raises InputError, and leaves nothing behind, whenever something is wrong.
    """
    plan = _Plan(kind, row_length, packing, documents, overlong, validation_fraction, rows_per_shard or 0)
    inputs = _inputs(plan, files, texts, dialogues)
    output = Path(output)
    fingerprint = _fingerprint(plan, tokenizer, inputs.sources)
    manifest = _existing(output, fingerprint)
    if manifest is not None:
        return manifest
    with _atomic_directory(output) as directory:
        manifest = _prepare(directory, plan, inputs, tokenizer, fingerprint, workers or os.cpu_count() or 1, progress)
    return manifest


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the rows depend on besides the tokenizer and the sources."""

    kind: str
    row_length: int
    packing: str
    documents: str
    overlong: str
    validation_fraction: float
    rows_per_shard: int

    def __post_init__(self):
        choices = {"kind": KINDS, "packing": rows.PACKINGS, "documents": sources.DOCUMENTS, "overlong": OVERLONG}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}")
        if self.row_length < 2:
            raise InputError(f"row_length is {self.row_length}, must be at least 2")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}, must be in [0, 1)")
        if self.rows_per_shard < 0:
            raise InputError(f"rows_per_shard is {self.rows_per_shard}, must be positive")
        if not self.rows_per_shard:
            default = max(1, _SHARD_BYTES // (8 * self.row_length))
            object.__setattr__(self, "rows_per_shard", default)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    documents: Iterator[Document]
    sources: list[dict[str, Any]] | None  # None: an iterator, which cannot be read twice
    expected_bytes: int | None


def _inputs(
    plan: _Plan,
    files: str | Sequence[str] | None,
    texts: Iterable[str] | None,
    dialogues: Iterable[Messages] | None,
) -> _Inputs:
    given = [name for name, value in (("files", files), ("texts", texts), ("dialogues", dialogues)) if value is not None]
    allowed = ("files", "dialogues" if plan.kind == "chat" else "texts")
    if len(given) != 1 or given[0] not in allowed:
        raise InputError(f"kind {plan.kind!r} needs one of {' or '.join(allowed)}, got {' and '.join(given) or 'none'}")
    if files is not None:
        paths = sources.expand_files(files)
        return _Inputs(_read_files(paths, plan), _describe_files(paths), sum(map(_expected_bytes, paths)))
    items = texts if dialogues is None else dialogues
    assert items is not None
    numbered = ((f"{given[0]}[{i}]", item) for i, item in enumerate(items))
    if dialogues is not None:
        numbered = ((where, sources.check_messages(list(item), where)) for where, item in numbered)
    if not isinstance(items, Sequence):
        return _Inputs(numbered, None, None)
    digest, size = hashlib.sha256(), 0
    for item in items:
        data = json.dumps(item, ensure_ascii=True).encode()
        digest.update(data + b"\n")
        size += len(data)
    return _Inputs(numbered, [{"file": given[0], "bytes": size, "sha256": digest.hexdigest()}], size)


def _read_files(paths: Sequence[str], plan: _Plan) -> Iterator[Document]:
    for path in paths:
        if plan.kind == "chat":
            yield from sources.read_dialogues(path)
        else:
            yield from ((path, text) for text in sources.read_documents(path, plan.documents))


def _describe_files(paths: Sequence[str]) -> list[dict[str, Any]]:
    def describe(path: str) -> dict[str, Any]:
        if path in sources.EMBEDDED:
            return {"file": path, "version": f"python {platform.python_version()}"}
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": path, "bytes": Path(path).stat().st_size, "sha256": digest}

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL; under 1% of the time to tokenise
        return list(pool.map(describe, paths))


def _expected_bytes(path: str) -> int:
    """Bytes of text to come, roughly: only for the estimate of the time left."""
    if path in sources.EMBEDDED:
        return 0
    return Path(path).stat().st_size * (3 if path.endswith((".gz", ".parquet")) else 1)


def _fingerprint(plan: _Plan, tokenizer: Tokenizer, described: list[dict[str, Any]] | None) -> str | None:
    if described is None:
        return None
    # Directories do not count: the same files may be reached by another path.
    contents = [source | {"file": Path(source["file"]).name} for source in described]
    facts = [FORMAT, dataclasses.asdict(plan), tokenizer.fingerprint, tokenizer.chat_template, contents]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _existing(output: Path, fingerprint: str | None) -> dict[str, Any] | None:
    """The manifest of `output` if it is the same preparation, None if there is nothing yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{output}: exists and is no prepared dataset; choose another --output") from None
    if fingerprint is None or manifest.get("preparation") != fingerprint:
        raise InputError(
            f"{output}: holds another preparation (other sources, tokenizer or settings); "
            "remove it or choose another --output"
        )
    return manifest


@contextlib.contextmanager
def _atomic_directory(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its place at the end and vanishes on any failure."""
    owner = f".{output.name}.partial-{socket.gethostname()}-"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f"{glob_escape(owner)}*"):  # by a process that was killed
            if not _is_alive(left.name.removeprefix(owner)):
                shutil.rmtree(left, ignore_errors=True)
        directory = output.parent / f"{owner}{os.getpid()}"
        directory.mkdir()
    except OSError as error:
        raise InputError(f"{output}: cannot write there ({error.strerror}); choose another --output") from error
    try:
        with _sigterm_raises():
            yield directory
            os.rename(directory, output)
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            raise InputError(f"{output}: no space left on the device; free some or choose another --output") from error
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def glob_escape(text: str) -> str:
    import glob

    return glob.escape(text)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets a polite kill unwind the stack like Ctrl-C, where no one else handles it."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _prepare(
    directory: Path,
    plan: _Plan,
    inputs: _Inputs,
    tokenizer: Tokenizer,
    fingerprint: str | None,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    """Writes the dataset and its validation part; the bookkeeping of both is in `_Subset`."""
    names = ["train", "validation"] if plan.validation_fraction else ["train"]
    places = {"train": directory, "validation": directory / "validation"}
    subsets = [_Subset(places[name], plan, tokenizer) for name in names]
    tokenise = _Tokenise(plan, tokenizer)
    bar = tqdm.tqdm(
        total=inputs.expected_bytes,
        unit="B",
        unit_scale=True,
        desc="tokenising",
        disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    with bar, contextlib.ExitStack() as stack:
        for subset in subsets:
            stack.callback(subset.writer.abandon)
        index = dropped = 0
        for result in _parallel(tokenise, _chunks(inputs.documents), workers):
            indices = np.arange(index, index + len(result.text_bytes))
            held_out = rows.uniform(_VALIDATION_SEED, 0, indices) < plan.validation_fraction
            index += len(indices)
            dropped += result.dropped
            for document, in_validation in enumerate(held_out):
                subsets[int(in_validation)].add(result, document)
            bar.update(sum(result.text_bytes))
        if not index:
            raise InputError("the sources hold no text; nothing was written")
        manifests = [subset.finish() for subset in subsets]
        if bar.total:
            bar.total = bar.n
    common = {
        "preparation": fingerprint,
        "sources": inputs.sources,
        "validation_fraction": plan.validation_fraction,
        "dropped": dropped,
    }
    for name, manifest in zip(names, manifests, strict=True):
        if not manifest["rows"]:
            raise InputError(
                f"none of the {index} documents fell into the {name} part; change validation_fraction "
                f"({plan.validation_fraction}) or make smaller documents (--documents=paragraph)"
            )
        manifest |= common | {"subset": name, "subsets": names}
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (places[name] / "manifest.json").write_text(text, encoding="utf-8")
    return manifests[0]


@dataclasses.dataclass
class _Chunk:
    """Tokenised documents, flat, as they come back from a worker."""

    ids: np.ndarray  # int32, all examples one after another
    ends: np.ndarray  # of the examples in `ids`
    prompt_lengths: list[int]
    documents: list[int]  # index within the chunk of the document of each example, ascending
    text_bytes: list[int]  # one for each document
    dropped: int

    def examples(self, document: int) -> Iterator[tuple[np.ndarray, int]]:
        first, last = np.searchsorted(self.documents, [document, document + 1])
        for i in range(first, last):
            start = self.ends[i - 1] if i else 0
            yield self.ids[start : self.ends[i]], self.prompt_lengths[i]


class _Tokenise:
    """Tokenises a chunk; pickled by the path of its tokenizer, once for each process."""

    def __init__(self, plan: _Plan, tokenizer: Tokenizer):
        self.plan, self.tokenizer = plan, tokenizer
