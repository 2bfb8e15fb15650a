"""Files of text or dialogues become a directory of rows: shards, lengths, tokenizer, manifest."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tqdm

from llada_jax.data import packing, sources
from llada_jax.data.dataset import FORMAT, KINDS, ShardWriter, read_manifest
from llada_jax.data.tokenizer import Messages, Tokenizer
from llada_jax.fields import InputError
from llada_jax.files import atomic_directory

OVERLONG = ("error", "drop")

_CHUNK_BYTES = 2**18  # of text, the unit of work of one process: a fraction of a second
_SHARD_BYTES = 2**28  # before compression
_TOKENIZER_FACTS = ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id", "mask_id", "eot_id")
_VALIDATION_SEED = 0x5EED  # fixed: a document stays on its side whatever else changes

Item = TypeVar("Item")
Result = TypeVar("Result")
Document = tuple[str, Any]  # where it stands ("file:line"), its text or messages


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the rows depend on besides the sources and the tokenizer."""

    kind: str
    row_length: int
    packing: str
    documents: str
    overlong: str
    validation_fraction: float
    rows_per_shard: int

    def __post_init__(self):
        choices = {
            "kind": KINDS,
            "packing": packing.PACKINGS,
            "documents": sources.DOCUMENTS,
            "overlong": OVERLONG,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise InputError(f"{name} is {given!r}, must be one of {', '.join(allowed)}")
        if self.row_length < 2:
            raise InputError(f"row_length is {self.row_length}, must be at least 2")
        if not 0 <= self.validation_fraction < 1:
            given = self.validation_fraction
            raise InputError(f"validation_fraction is {given}, must be at least 0 and below 1")
        if self.rows_per_shard < 1:
            raise InputError(f"rows_per_shard is {self.rows_per_shard}, must be at least 1")


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
    """Writes the rows of `files` (or, in memory, `texts` or `dialogues`); returns the manifest.

    `packing` and `documents` (what a document of a text file is) concern kind "text"; `overlong`
    ("error" or "drop", for rows of more than `row_length` tokens) kind "chat". A share
    `validation_fraction` of the documents goes to `output/validation`, a dataset of the same form.
    The rows do not depend on `workers`. An existing `output` is kept if it is the same preparation.
    Raises InputError for whatever a user can get wrong, and then leaves nothing behind.
    """
    shard_rows = rows_per_shard or max(1, _SHARD_BYTES // (8 * row_length)) if row_length > 0 else 1
    plan = Plan(kind, row_length, packing, documents, overlong, validation_fraction, shard_rows)
    stream, described = _open_sources(plan, files, texts, dialogues)
    output = Path(output)
    fingerprint = _fingerprint(plan, tokenizer, described)
    manifest = _existing(output, fingerprint, described)
    if manifest is not None:
        return manifest
    with atomic_directory(output) as directory, _progress_bar(described, progress) as bar:
        shared = {"preparation": fingerprint, "sources": described}
        tokenise = functools.partial(_tokenise_chunk, plan, tokenizer)
        tokenised = _map_in_order(tokenise, _chunks(stream), workers or os.cpu_count() or 1)
        with contextlib.closing(tokenised):  # stops the processes, also after a failure
            return _write(directory, plan, tokenizer, tokenised, shared, bar)


def _open_sources(
    plan: Plan,
    files: str | Sequence[str] | None,
    texts: Iterable[str] | None,
    dialogues: Iterable[Messages] | None,
) -> tuple[Iterator[Document], list[dict[str, Any]] | None]:
    """The documents, and a description of their origin (None for iterators, read only once)."""
    inputs = {"files": files, "texts": texts, "dialogues": dialogues}
    given = [name for name, value in inputs.items() if value is not None]
    allowed = ("files", "dialogues" if plan.kind == "chat" else "texts")
    if len(given) != 1 or given[0] not in allowed:
        found = " and ".join(given) or "none"
        raise InputError(f"kind {plan.kind!r} takes one of {' or '.join(allowed)}, got {found}")
    if files is not None:
        paths = sources.expand_files(files)
        with ThreadPoolExecutor() as pool:  # hashing takes 1% of the time that tokenising takes
            return _read_files(paths, plan), list(pool.map(_describe_file, paths))
    name, items = given[0], inputs[given[0]]
    assert items is not None
    stream = ((f"{name}[{i}]", item) for i, item in enumerate(items))
    if dialogues is not None:
        stream = ((where, sources.check_messages(list(item), where)) for where, item in stream)
    if not isinstance(items, Sequence):
        return stream, None
    digest, size = hashlib.sha256(), 0
    for item in items:
        data = json.dumps(item).encode()
        digest.update(data + b"\n")
        size += len(data)
    return stream, [{"file": name, "bytes": size, "sha256": digest.hexdigest()}]


def _read_files(paths: Sequence[str], plan: Plan) -> Iterator[Document]:
    for path in paths:
        if plan.kind == "chat":
            yield from sources.read_dialogues(path)
        else:
            yield from ((path, text) for text in sources.read_documents(path, plan.documents))


def _describe_file(path: str) -> dict[str, Any]:
    if path == "python_reference":
        return {"file": path, "version": platform.python_version()}
    place = sources.COUPLETS if path == "couplets" else Path(path)
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path, "bytes": place.stat().st_size, "sha256": digest}


def _fingerprint(plan: Plan, tokenizer: Tokenizer, described: list[dict[str, Any]] | None) -> str | None:
    if described is None:
        return None
    # Directories do not count: the same file may be reached by another path.
    contents = [source | {"file": Path(source["file"]).name} for source in described]
    special = [tokenizer.fingerprint, tokenizer.chat_template, tokenizer.mask_id, tokenizer.eot_id]
    facts = [FORMAT, dataclasses.asdict(plan), special, contents]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _existing(output: Path, fingerprint: str | None, described: list | None) -> dict[str, Any] | None:
    """The manifest of `output` if it is the same preparation, None if there is nothing yet."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / "manifest.json").exists():
        raise InputError(f"{output}: exists and is no prepared dataset; choose another --output")
    manifest = read_manifest(output)
    if fingerprint is None or manifest.get("preparation") != fingerprint:
        if changed := _changed_sources(manifest.get("sources"), described):
            raise InputError(
                f"{changed}: changed since {output} was prepared from it; restore it, or prepare it in another place"
            )
        raise InputError(
            f"{output}: holds another preparation (other sources, tokenizer or settings); "
            "remove it or choose another --output"
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


@dataclasses.dataclass
class _Tokenised:
    """What one document gave: its examples (ids, length of the prompt), not yet rows."""

    examples: list[tuple[np.ndarray, int]]
    text_bytes: int
    dropped: int = 0


def _chunks(stream: Iterator[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for where, content in stream:
        chunk.append((where, content))
        messages = [{"content": content}] if isinstance(content, str) else content
        size += sum(len(message["content"]) for message in messages)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenise_chunk(plan: Plan, tokenizer: Tokenizer, chunk: list[Document]) -> list[_Tokenised]:
    tokenise = _tokenise_dialogue if plan.kind == "chat" else _tokenise_text
    return [tokenise(plan, tokenizer, where, content) for where, content in chunk]


def _tokenise_text(plan: Plan, tokenizer: Tokenizer, where: str, text: str) -> _Tokenised:
    ids_N = np.asarray(tokenizer.encode(text), np.int32)
    return _Tokenised([(ids_N, 0)], len(text.encode()))


def _tokenise_dialogue(plan: Plan, tokenizer: Tokenizer, where: str, messages: list[dict[str, str]]) -> _Tokenised:
    examples = packing.dialogue_rows(messages, tokenizer)
    fitting = [example for example in examples if len(example[0]) <= plan.row_length]
    if len(fitting) < len(examples) and plan.overlong == "error":
        longest = max(len(ids_N) for ids_N, _ in examples)
        raise InputError(
            f"{where}: the dialogue has {longest} tokens, row_length is {plan.row_length}; "
            "raise --row_length or leave such replies out with --overlong=drop"
        )
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    text_bytes = sum(
        len(answer.encode())
        for answer, (ids_N, _) in zip(answers, examples, strict=True)
        if len(ids_N) <= plan.row_length
    )
    return _Tokenised(fitting, text_bytes, len(examples) - len(fitting))


def _map_in_order(function: Callable[[Item], Result], items: Iterator[Item], workers: int) -> Generator[Result]:
    """Like map, in `workers` processes, with a bounded number of items under way."""
    head = list(itertools.islice(items, 8))
    items = itertools.chain(head, items)
    if workers == 1 or len(head) < 8:  # starting processes would take longer
        yield from map(function, items)
        return
    # Spawned, not forked: the caller may hold threads (JAX, Rust) that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        message = "a tokenising process died, perhaps for lack of memory; use fewer --workers"
        raise InputError(message) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent():
    """In a worker: Ctrl-C is the parent's affair, and a parent killed outright takes us with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Subset:
    """One dataset in the making: packs examples into rows, writes and counts them."""

    def __init__(self, directory: Path, plan: Plan, tokenizer: Tokenizer):
        self.directory, self._plan, self._tokenizer = directory, plan, tokenizer
        self.writer = ShardWriter(directory, plan.rows_per_shard)
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        self._packer = packing.Packer(plan.row_length, plan.packing, *ids)
        self._counts = {"documents": 0, "bytes": 0, "dropped": 0}

    def add(self, document: _Tokenised):
        self._counts["documents"] += 1
        self._counts["bytes"] += document.text_bytes
        self._counts["dropped"] += document.dropped
        for ids_N, prompt_length in document.examples:
            if self._plan.kind == "chat":
                row = packing.pad_row(ids_N, self._plan.row_length, self._tokenizer.pad_id)
                self.writer.write(*row, prompt_length, len(ids_N))
            else:
                self._write(self._packer.add(ids_N))

    def finish(self, shared: dict[str, Any]) -> dict[str, Any]:
        self._write(self._packer.flush())
        plan = dataclasses.asdict(self._plan)
        plan["documents_are"] = plan.pop("documents")
        tokenizer = {name: getattr(self._tokenizer, name) for name in _TOKENIZER_FACTS}
        tokenizer["file"] = self._tokenizer.save(self.directory)[0].name
        manifest = {"format": FORMAT, **plan, **self._counts, **self.writer.finish()}
        manifest |= {"tokenizer": tokenizer, **shared}
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (self.directory / "manifest.json").write_text(text, encoding="utf-8")
        return manifest

    def _write(self, packed: Iterable[packing.Row]):
        for tokens_L, segment_ids_L in packed:
            self.writer.write(tokens_L, segment_ids_L, 0, int(np.count_nonzero(segment_ids_L)))


def _write(
    directory: Path,
    plan: Plan,
    tokenizer: Tokenizer,
    tokenised: Iterator[list[_Tokenised]],
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
        for chunk in tokenised:
            draws = packing.uniform(_VALIDATION_SEED, 0, np.arange(number, number + len(chunk)))
            for document, draw in zip(chunk, draws, strict=True):
                held_out = draw < plan.validation_fraction
                subsets["validation" if held_out else "train"].add(document)
            number += len(chunk)
            bar.update(sum(document.text_bytes for document in chunk))
        if not number:
            raise InputError("the sources hold no text; nothing was written")
        manifests = {}
        for name, subset in subsets.items():
            manifests[name] = subset.finish(shared | {"subset": name, "subsets": list(places)})
            if not manifests[name]["rows"]:
                raise InputError(
                    f"the {name} part of {number} documents has no rows; change "
                    f"validation_fraction ({plan.validation_fraction}) or make documents smaller "
                    "(--documents=paragraph)"
                )
    return manifests["train"]
