"""Prepares a dataset: reads files, encodes them in several processes and writes a directory of rows.

The directory appears when it is complete. The rows do not depend on the number of processes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from llada_jax.data import KINDS, packing, sources
from llada_jax.data.dataset import FORMAT, ShardWriter, read_manifest
from llada_jax.data.kind import LONGEST_ROW, OVERLONG, Encoded, Plan
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.fields import InputError
from llada_jax.files import atomic_directory, hash_file
from llada_jax.storage import mirror

_CHUNK_CHARACTERS = 2**18  # the unit of work of one process: a fraction of a second
_FEW_CHUNKS = 8  # less than that many are encoded without starting processes
_SHARD_BYTES = 2**28  # before compression
_TOKENIZER_FACTS = ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id", "mask_id", "eot_id")
_VALIDATION_SEED = 0x5EED  # fixed: a document stays on its side whatever else changes

Item = tuple[str, Any]  # where it stands ("file:line"), its content
Encode = Callable[[Any, str, Tokenizer, Plan], Encoded]


def prepare_dataset(
    output: str | os.PathLike,
    *,
    kind: str = "text",
    files: str | Sequence[str] | None = None,
    items: Iterable[Any] | None = None,
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
    """Writes the rows of `files` (or, in memory, `items`: texts, or lists of messages); returns the manifest.

    `packing` and `documents` (what a document of a text file is) concern kind "text"; `overlong`
    ("error" or "drop", for rows of more than `row_length` tokens) kind "chat". A share
    `validation_fraction` of the documents goes to `output/validation`, a dataset of the same form.
    The rows do not depend on `workers`. An existing `output` is kept if it is the same preparation. For an `output` in
    a bucket (gs://, s3://) they are written on this machine, then brought there.
    Raises InputError for whatever a user can get wrong, and then leaves nothing behind.
    """
    shard_rows = rows_per_shard or max(1, _SHARD_BYTES // (8 * row_length)) if row_length > 0 else 1
    plan = Plan(kind, row_length, packing, documents, overlong, validation_fraction, shard_rows)
    _check(plan)
    stream, described = _open_sources(plan, files, items)
    output = sources.check_unicode(os.fspath(output), f"{str(output)!r}, the name of the output")
    fingerprint = _fingerprint(plan, tokenizer, described)
    with mirror.opened(output) as place:
        place.fetch()
        manifest = _existing(place, fingerprint, described)
        if manifest is not None:
            return manifest
        with atomic_directory(place.local) as directory, _progress_bar(described, progress) as bar:
            shared = {"preparation": fingerprint, "sources": described}
            encode = functools.partial(_encode_chunk, plan, tokenizer, KINDS[kind].encode)
            encoded = _encoded_in_order(encode, _chunks(stream), workers or os.cpu_count() or 1)
            with contextlib.closing(encoded):  # stops the processes, also after a failure
                manifest = _write(directory, plan, tokenizer, encoded, shared, bar)
        place.push()
        return manifest


def _check(plan: Plan) -> None:
    choices = {
        "kind": tuple(KINDS),
        "packing": packing.PACKINGS,
        "documents": sources.DOCUMENTS,
        "overlong": OVERLONG,
    }
    for name, allowed in choices.items():
        if getattr(plan, name) not in allowed:
            raise InputError(f"{name} is {getattr(plan, name)!r}, must be one of {', '.join(allowed)}")
    if not 2 <= plan.row_length <= LONGEST_ROW:
        raise InputError(f"row_length is {plan.row_length}, must be from 2 to {LONGEST_ROW}")
    if not 0 <= plan.validation_fraction < 1:
        raise InputError(f"validation_fraction is {plan.validation_fraction}, must be at least 0 and below 1")
    if plan.rows_per_shard < 1:
        raise InputError(f"rows_per_shard is {plan.rows_per_shard}, must be at least 1")


def _open_sources(
    plan: Plan, files: str | Sequence[str] | None, items: Iterable[Any] | None
) -> tuple[Iterator[Item], list[dict[str, Any]] | None]:
    """The items, and a description of their origin (None for iterators, read only once)."""
    if (files is None) == (items is None):
        raise InputError("a preparation takes either files or items")
    if files is not None:
        paths = sources.expand_files(files)
        read = KINDS[plan.kind].read
        with ThreadPoolExecutor() as pool:  # hashing takes 1% of the time that tokenising takes
            described = list(pool.map(_describe_file, paths))
        return (item for path in paths for item in read(path, plan)), described
    assert items is not None
    stream = ((f"items[{i}]", item) for i, item in enumerate(items))
    if not isinstance(items, Sequence):
        return stream, None
    digest, size = hashlib.sha256(), 0
    for item in items:
        data = json.dumps(item).encode()
        digest.update(data + b"\n")
        size += len(data)
    return stream, [{"file": "items", "bytes": size, "sha256": digest.hexdigest()}]


def _describe_file(path: str) -> dict[str, Any]:
    if path == "python_reference":
        return {"file": path, "version": platform.python_version()}
    place = sources.COUPLETS if path == "couplets" else Path(path)
    return {"file": path, "bytes": place.stat().st_size, "sha256": hash_file(place)}


def _fingerprint(plan: Plan, tokenizer: Tokenizer, described: list[dict[str, Any]] | None) -> str | None:
    if described is None:
        return None
    # Directories do not count: the same file may be reached by another path.
    contents = [source | {"file": Path(source["file"]).name} for source in described]
    special = [tokenizer.fingerprint, tokenizer.chat_template, tokenizer.mask_id, tokenizer.eot_id]
    facts = [FORMAT, dataclasses.asdict(plan), special, contents]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _existing(output: mirror.Workdir, fingerprint: str | None, described: list | None) -> dict[str, Any] | None:
    """The manifest of `output` if it is the same preparation, None if there is nothing yet."""
    directory = output.local
    if not os.path.exists(directory) or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not os.path.exists(directory / "manifest.json"):
        raise InputError(f"{output}: exists and is no prepared dataset; choose another place")
    manifest = read_manifest(directory)
    if fingerprint is None or manifest.get("preparation") != fingerprint:
        if changed := _changed_sources(manifest.get("sources"), described):
            raise InputError(
                f"{changed}: changed since {output} was prepared from it; restore it, or prepare it in another place"
            )
        raise InputError(
            f"{output}: holds another preparation (other sources, tokenizer or settings); "
            "remove it or choose another place"
        )
    return manifest


def _changed_sources(before: object, now: list[dict[str, Any]] | None) -> str:
    """The sources of the same name that have other contents than before."""
    known = (
        {Path(str(s.get("file"))).name: s for s in before if isinstance(s, dict)} if isinstance(before, list) else {}
    )
    changed = []
    for source in now or []:
        old = known.get(Path(source["file"]).name)
        if old is not None and any(old.get(name) != source[name] for name in source if name != "file"):
            changed.append(source["file"])
    return ", ".join(changed[:5])


def _progress_bar(described: list[dict[str, Any]] | None, progress: bool) -> tqdm.tqdm:
    sizes = [source.get("bytes", 0) for source in described or []]
    packed = [3 if source["file"].endswith((".gz", ".parquet")) else 1 for source in described or []]
    return tqdm.tqdm(
        # Bytes of text to come, roughly: it serves the estimate of the time left.
        total=sum(size * factor for size, factor in zip(sizes, packed, strict=True)) or None,
        desc="tokenising",
        unit="B",
        unit_scale=True,
        disable=not progress,
        delay=1,  # seconds, so that what fails at once prints its one line alone
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def _chunks(stream: Iterator[Item]) -> Iterator[list[Item]]:
    chunk, size = [], 0
    for where, content in stream:
        chunk.append((where, content))
        size += _characters(content)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _characters(content: Any) -> int:
    """Of all text in an item."""
    if isinstance(content, Mapping):
        return sum(map(_characters, content.values()))
    if isinstance(content, list | tuple):
        return sum(map(_characters, content))
    return len(content) if isinstance(content, str) else 1


def _encode_chunk(plan: Plan, tokenizer: Tokenizer, encode: Encode, chunk: list[Item]) -> list[Encoded]:
    return [encode(content, where, tokenizer, plan) for where, content in chunk]


def _encoded_in_order(
    encode: Callable[[list[Item]], list[Encoded]], chunks: Iterator[list[Item]], workers: int
) -> Generator[list[Encoded]]:
    """Like map, in `workers` processes, with a bounded number of chunks under way; in this process if they are few.

    Each process serves one thread here. On any end they are killed: one document may take a minute, and who stops a
    preparation should not wait for it.
    """
    head = list(itertools.islice(chunks, max(_FEW_CHUNKS, workers)))
    if sum(_characters(content) for chunk in head for _, content in chunk) < _FEW_CHUNKS * _CHUNK_CHARACTERS:
        yield from map(encode, head)  # starting processes would take longer
        return
    workers = min(workers, len(head))
    processes, idle, pending, over = [], queue.SimpleQueue(), deque(), threading.Event()
    pool = ThreadPoolExecutor(workers)
    try:
        pool.submit(_start, workers, encode, processes, idle, over).result()
        for chunk in itertools.chain(head, chunks):
            pending.append(pool.submit(_encode_elsewhere, idle, chunk))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        over.set()
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _start(
    workers: int, encode: Callable, processes: list[BaseProcess], idle: queue.SimpleQueue, over: threading.Event
) -> None:
    """Starts the processes; `idle` gets a connection to each. In a thread, where no signal can interrupt the hand-over.

    They inherit blocked signals: Ctrl-C and SIGTERM to the whole group are the parent's affair, from their beginning.
    """
    # Spawned, not forked: the caller may hold threads (JAX, Rust) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # which the first start would do, and unblock the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # of this thread
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, encode), daemon=True)
        process.start()
        processes.append(process)
        if over.is_set():  # since the others were killed
            process.kill()
        theirs.close()  # so that the end of the process is the end of what comes from it
        idle.put(ours)


def _encode_elsewhere(idle: queue.SimpleQueue, chunk: list[Item]) -> list[Encoded]:
    connection = idle.get()
    try:
        connection.send(chunk)
        answer = connection.recv()
    except (EOFError, OSError) as error:
        message = "a tokenising process died, perhaps for lack of memory; use fewer workers"
        raise InputError(message) from error
    finally:
        idle.put(connection)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _work(connection: Connection, encode: Callable[[list[Item]], list[Encoded]]) -> None:
    """What a process does: it encodes the chunks that come, until no more come or its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            chunk = connection.recv()
            try:
                answer = encode(chunk)
            except Exception as error:
                answer = error
            connection.send(answer)


class _Subset:
    """One dataset in the making: makes records of examples, writes and counts them."""

    def __init__(self, directory: Path, plan: Plan, tokenizer: Tokenizer):
        self.directory, self._plan, self._tokenizer = directory, plan, tokenizer
        kind = KINDS[plan.kind]
        self.writer = ShardWriter(directory, kind.fields(plan.row_length, tokenizer.vocab_size), plan.rows_per_shard)
        self._packer = kind.pack and kind.pack(plan, tokenizer)
        self._counts = {"documents": 0, "bytes": 0, "scored_tokens": 0, "dropped": 0}

    def add(self, encoded: Encoded):
        self._counts["documents"] += 1
        self._counts["bytes"] += encoded.bytes
        self._counts["scored_tokens"] += encoded.scored_tokens
        self._counts["dropped"] += encoded.dropped
        for example in encoded.examples:
            for record in self._packer.add(example) if self._packer else [example]:
                self.writer.write(record)

    def finish(self, shared: dict[str, Any]) -> dict[str, Any]:
        for record in self._packer.flush() if self._packer else []:
            self.writer.write(record)
        plan = dataclasses.asdict(self._plan)
        plan["documents_are"] = plan.pop("documents")
        tokenizer = {name: getattr(self._tokenizer, name) for name in _TOKENIZER_FACTS}
        tokenizer["file"] = self._tokenizer.save(self.directory)[0].name
        manifest = {"format": FORMAT, **plan, **self._counts, **self.writer.finish()}
        manifest |= {"tokenizer": tokenizer, **shared}
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self.directory / "manifest.json").write_text(text, encoding="utf-8")
        return manifest


def _write(
    directory: Path,
    plan: Plan,
    tokenizer: Tokenizer,
    encoded: Iterator[list[Encoded]],
    shared: dict[str, Any],
    bar: tqdm.tqdm,
) -> dict[str, Any]:
    """Writes the dataset and its validation part; returns the manifest of the former."""
    places = {"train": directory}
    if plan.validation_fraction:
        places["validation"] = directory / "validation"
    subsets = {name: _Subset(place, plan, tokenizer) for name, place in places.items()}
    with contextlib.ExitStack() as stack:
        for subset in subsets.values():
            stack.callback(subset.writer.close)
        number = 0
        for chunk in encoded:
            draws = packing.uniform(_VALIDATION_SEED, 0, np.arange(number, number + len(chunk)))
            for document, draw in zip(chunk, draws, strict=True):
                held_out = draw < plan.validation_fraction
                subsets["validation" if held_out else "train"].add(document)
            number += len(chunk)
            bar.update(sum(document.bytes for document in chunk))
        if not number:
            raise InputError("the sources hold no text; nothing was written")
        manifests = {}
        for name, subset in subsets.items():
            manifests[name] = subset.finish(shared | {"subset": name, "subsets": list(places)})
            if not manifests[name]["rows"]:
                raise InputError(
                    f"the {name} part of {number} documents has no rows; change validation_fraction "
                    f"({plan.validation_fraction}) or row_length ({plan.row_length}), or make documents smaller "
                    "(documents=paragraph)"
                )
    return manifests["train"]
