"""One tokenizer over a SentencePiece `.model` or a Hugging Face `tokenizer.json`."""

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from llada_jax.data import chat_template
from llada_jax.data.sources import check_unicode
from llada_jax.fields import InputError
from llada_jax.files import LARGEST_JSON, read_bytes, read_json, read_text

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"  # also the padding
MASK = "<|mdm_mask|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
EOT = "<|eot_id|>"

# The template of LLaDA-8B-Instruct's tokenizer_config.json. It appends the assistant header always.
LLADA_CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

Messages = Sequence[Mapping[str, str]]

ROLES = ("system", "user", "assistant")

_META = "▁"  # SentencePiece writes a space as U+2581, so that character itself needs care
_LARGEST_VOCABULARY = 2**24  # ids; the embedding of a model has a row for each
_LARGEST_GROWTH = 64  # of a text by normalisation, which in Unicode is at most eleven times
_ALWAYS_ALLOWED = 2**27  # bytes of a normalised text, however much it grew


class Tokenizer:
    """Text to ids and back, with the ids of LLaDA's special tokens; made by `load_tokenizer`."""

    def __init__(self, model: "_SentencePiece | _TokenizerJson", path: Path, fingerprint: str):
        self._model = model
        self.path = path  # of the tokenizer file
        self.fingerprint = fingerprint  # its SHA-256
        self.vocab_size: int = model.vocab_size
        self.bos_id: int = model.bos_id
        self.eos_id: int = model.eos_id
        self.pad_id: int = model.pad_id
        self.mask_id: int = model.mask_id
        self.eot_id: int = model.eot_id
        self.chat_template: str = model.chat_template
        self._shown = {self.bos_id: "␂", self.eos_id: "␃", self.eot_id: "␄", self.mask_id: "▒"}

    def __reduce__(self):
        # Another process reads the file again, once.
        return _load_once, (self.path, self.mask_id, self.eot_id)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; nothing is added at either end. Raises InputError if it is not Unicode."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int], keep_special: bool = False) -> str:
        """The text of the ids; special tokens are left out unless `keep_special`."""
        return self._model.decode([int(i) for i in ids], keep_special)

    def piece(self, id: int) -> str:
        """Printable text of one id: the mask is `▒`, BOS, EOS, EOT are `␂ ␃ ␄`, a line end `⏎`."""
        text = self._shown.get(int(id)) or self._model.piece(int(id))
        return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")

    def encode_chat(self, messages: Messages) -> list[int]:
        """Ids of a prompt: BOS, every message under its header, and the header of the reply."""
        for message in messages:
            check_unicode(message["role"] + message["content"], "a message")
        return self._model.encode_chat(messages)

    def chat_text(self, messages: Messages) -> str:
        """The text of `encode_chat`, special tokens by their names; `encode_marked` makes its ids of it."""
        for message in messages:
            check_unicode(message["role"] + message["content"], "a message")
        return self._model.chat_text(messages)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these."""
        return self._model.encode_marked(text)

    def encode_answer(self, content: str) -> list[int]:
        """Ids of a reply as it follows `encode_chat`: the stripped text and the end of the turn."""
        return [*self.encode(content.strip()), self.eot_id]

    def save(self, directory: str | os.PathLike) -> list[Path]:
        """Copies the files into the directory, under names that `load_tokenizer` finds."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        copies = []
        for source, name in self._model.files(self.path):
            copies.append(directory / name)
            if not (copies[-1].exists() and copies[-1].samefile(source)):
                partial = directory / f".{name}.{os.getpid()}"
                shutil.copyfile(source, partial)
                partial.replace(copies[-1])  # at once: a run that was killed here finds the old one or the new
        return copies


def load_tokenizer(path: str | os.PathLike, *, mask_id: int | None = None, eot_id: int | None = None) -> Tokenizer:
    """Reads a tokenizer from a `.model` or `tokenizer.json` file or the directory that holds one.

    `mask_id` and `eot_id` are for files that do not name these tokens (iLLaDA's mask is id 5).
    Raises InputError if there is no tokenizer or it lacks BOS, EOS or the mask.
    """
    file = _find_tokenizer(Path(path))
    given = {"mask_id": mask_id, "eot_id": eot_id}
    try:
        data = read_bytes(file, LARGEST_JSON)
        model = (_TokenizerJson if file.suffix == ".json" else _SentencePiece)(file, data, given)
        if model.vocab_size > _LARGEST_VOCABULARY:
            raise InputError(f"{file}: has the id {model.vocab_size - 1}, none may exceed {_LARGEST_VOCABULARY - 1}")
        return Tokenizer(model, file, hashlib.sha256(data).hexdigest())
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise bare Exception or RuntimeError, and Rust a panic of its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: not a readable tokenizer ({reason}); make or copy it again") from error


@functools.cache
def _load_once(path: Path, mask_id: int, eot_id: int) -> Tokenizer:
    return load_tokenizer(path, mask_id=mask_id, eot_id=eot_id)


class _SentencePiece:
    """A SentencePiece model whose special tokens are control symbols, which no text can spell."""

    def __init__(self, path: Path, data: bytes, given: Mapping[str, int | None]):
        self._path, self._sp = path, sentencepiece.SentencePieceProcessor(model_proto=data)  # pyright: ignore
        self.vocab_size = self._sp.vocab_size()
        self._special = {i: self._sp.id_to_piece(i) for i in range(self.vocab_size) if self._sp.is_control(i)}
        ids = {token: i for i, token in self._special.items()}
        for token in (BOS, EOS, MASK, START_HEADER, END_HEADER, EOT):
            known = given["mask_id"] if token == MASK else given["eot_id"] if token == EOT else None
            if token not in ids and known is None:
                raise InputError(f"{path}: no control symbol {token}; train it with tools/train_tokenizer.py")
        self.bos_id, self.eos_id, self.pad_id = ids[BOS], ids[EOS], ids[EOS]
        self.mask_id = ids[MASK] if given["mask_id"] is None else given["mask_id"]
        self.eot_id = ids[EOT] if given["eot_id"] is None else given["eot_id"]
        self._start_header, self._end_header = ids[START_HEADER], ids[END_HEADER]
        # As a piece, U+2581 would come back as a space; as three bytes it does not. A vocabulary without that piece (no
        # text of its training held a space) has these bytes for a space, too, unless that is written as a byte here.
        by_bytes = _META if self._is_text(self._sp.piece_to_id(_META)) else f"{_META} "
        self._ids_of_bytes = {c: [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in c.encode()] for c in by_bytes}
        self._by_bytes = re.compile(f"([{by_bytes}])")
        # Of a ModelProto: its normaliser and its denormaliser, each with a table of replacements.
        self._normalizer, self._denormalizer = (
            [_table(table) for spec in _messages(data, number) for table in _messages(spec, 2)] for number in (3, 5)
        )
        self._longest = max(_bytes(self._sp.id_to_piece(i)) for i in range(self.vocab_size))
        self.chat_template = LLADA_CHAT_TEMPLATE

    def encode(self, text: str) -> list[int]:
        _require_bounded(self._path, self._normalizer, _bytes(text))
        parts = self._by_bytes.split(text)
        return [id for part in parts for id in self._ids_of_bytes.get(part) or self._sp.encode(part)]

    def decode(self, ids: list[int], keep_special: bool) -> str:
        parts = []
        _require_bounded(self._path, self._denormalizer, len(ids), self._longest)
        for is_text, group in itertools.groupby(ids, self._is_text):
            if is_text:
                parts.append(self._sp.decode(list(group)))
            else:  # the unknown id and ids beyond the vocabulary have no text
                parts += [self._special.get(i, "\ufffd") for i in group if keep_special or i not in self._special]
        return "".join(parts)

    def piece(self, id: int) -> str:
        if not self._is_text(id):
            return self._special.get(id, "\ufffd")
        piece = self._sp.id_to_piece(id)
        if self._sp.is_byte(id) and not 0x20 <= int(piece[3:5], 16) < 0x7F:  # <0xE6>
            return f"‹{piece[3:5]}›"
        return self._sp.decode([id])

    def encode_chat(self, messages: Messages) -> list[int]:
        """The ids of LLaDA's template, put together by id: no content can end its own turn."""
        ids = [self.bos_id] if messages else []
        for message in messages:
            content = "\n\n" + message["content"].strip()
            ids += [*self._header(message["role"]), *self.encode(content), self.eot_id]
        return [*ids, *self._header("assistant"), *self.encode("\n\n")]

    def chat_text(self, messages: Messages) -> str:
        return _llada_template().render(messages=messages, bos_token=BOS)

    def encode_marked(self, text: str) -> list[int]:
        ids = {name: id for id, name in self._special.items()}
        parts = re.split(f"({'|'.join(map(re.escape, ids))})", text)
        return [id for part in parts for id in ([ids[part]] if part in ids else self.encode(part))]

    def files(self, path: Path) -> list[tuple[Path, str]]:
        return [(path, "tokenizer.model")]

    def _header(self, role: str) -> list[int]:
        return [self._start_header, *self.encode(role), self._end_header]

    def _is_text(self, id: int) -> bool:
        return 0 <= id < self.vocab_size and id not in self._special and not self._sp.is_unknown(id)


class _TokenizerJson:
    """A Hugging Face `tokenizer.json` with the settings that lie beside it; followed as it is."""

    def __init__(self, path: Path, data: bytes, given: Mapping[str, int | None]):
        self._hf = tokenizers.Tokenizer.from_str(data.decode())
        self._hf.no_padding()
        self._hf.no_truncation()
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path.parent / name).exists():
                settings |= read_json(path.parent / name)
        vocabulary = self._hf.get_vocab(with_added_tokens=True)
        self.vocab_size, self._longest = max(vocabulary.values()) + 1, max(map(_bytes, vocabulary))
        self._normalizer, self._decoder = _steps(self._hf.normalizer), _steps(self._hf.decoder)
        self._names = {
            "bos_token": _token_text(settings.get("bos_token")) or BOS,
            "eos_token": _token_text(settings.get("eos_token")) or EOS,
            "mask_token": _token_text(settings.get("mask_token")) or MASK,
        }
        self._names["pad_token"] = _token_text(settings.get("pad_token")) or self._names["eos_token"]

        def id_of(name: str) -> int:
            id = self._hf.token_to_id(self._names[name])
            if id is None:
                raise InputError(
                    f"{path}: no {name} {self._names[name]!r}; name it in tokenizer_config.json beside it "
                    f'(iLLaDA: "mask_token" is the token of id 5)'
                )
            return id

        self.bos_id, self.eos_id, self.pad_id = (
            id_of("bos_token"),
            id_of("eos_token"),
            id_of("pad_token"),
        )
        self.mask_id = id_of("mask_token") if given["mask_id"] is None else given["mask_id"]
        eot_id = self._hf.token_to_id(EOT) if given["eot_id"] is None else given["eot_id"]
        self.eot_id = self.eos_id if eot_id is None else eot_id  # iLLaDA ends its turns with EOS
        self._path = path
        self.chat_template = _chat_template(path.parent, settings) or LLADA_CHAT_TEMPLATE
        if not isinstance(self.chat_template, str):
            raise InputError(f"{path.parent}: its chat_template is no text; copy it again")

    def encode(self, text: str) -> list[int]:
        _require_bounded(self._path, self._normalizer, _bytes(text))
        with _named_errors(self._path):
            return self._hf.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], keep_special: bool) -> str:
        ids = [id for id in ids if 0 <= id < self.vocab_size]  # others have no text
        _require_bounded(self._path, self._decoder, len(ids), self._longest)
        with _named_errors(self._path):
            return self._hf.decode(ids, skip_special_tokens=not keep_special)

    def piece(self, id: int) -> str:
        return self.decode([id], keep_special=True) or "\ufffd"

    def encode_chat(self, messages: Messages) -> list[int]:
        return self.encode(self.chat_text(messages))

    def chat_text(self, messages: Messages) -> str:
        values = {"messages": messages, "add_generation_prompt": True, **self._names}
        if self.chat_template == LLADA_CHAT_TEMPLATE:  # that of everyone so far: at once, and trusted
            return _llada_template().render(values)
        return chat_template.render(self.chat_template, values, self._path.parent)

    def encode_marked(self, text: str) -> list[int]:
        return self.encode(text)

    def files(self, path: Path) -> list[tuple[Path, str]]:
        beside = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        present = [(path.parent / name, name) for name in beside if (path.parent / name).exists()]
        return [(path, "tokenizer.json"), *present]


@functools.cache
def _llada_template():
    return chat_template.environment().from_string(LLADA_CHAT_TEMPLATE)


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turns what the Rust library raises, bare Exceptions and panics, into an InputError that names the file."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: the tokenizer fails on this text ({reason}); make or copy it again") from error


def _require_bounded(path: Path, steps: Sequence[Mapping[str, Any]], size: int, each: int = 1) -> None:
    """Raises InputError if the steps of a normaliser or decoder might take all memory for so many bytes or ids.

    They follow one another: three replacements of a letter by a few hundred characters each make gigabytes.
    each: bytes of an id.
    """
    grown = size * each
    for step in steps:
        grown = min(_grown(step, grown), 2**62)
    if grown > max(_ALWAYS_ALLOWED, _LARGEST_GROWTH * size):
        raise InputError(
            f"{path}: what it replaces may make {grown:.1e} bytes of {size}; make or copy it again, or use smaller "
            "documents"
        )


def _bytes(text: str) -> int:
    return len(check_unicode(text, "the text").encode())


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or decoder of `tokenizers`, None for none; pickling shows what is in it."""
    steps, parts = [], [] if part is None else [json.loads(part.__getstate__())]
    while parts:
        step = parts.pop(0)
        parts[:0] = step.get("normalizers") or step.get("decoders") or []  # of a Sequence
        is_table = step["type"] == "Precompiled"
        steps.append(_table(base64.b64decode(step["precompiled_charsmap"])) if is_table else step)
    return steps


def _table(table: bytes) -> dict[str, Any]:
    """A table of SentencePiece as a step: the size of a trie, the trie, and the replacements, each ended by a NUL."""
    trie = int.from_bytes(table[:4], "little")
    return {"type": "Table", "longest": max(map(len, table[4 + trie :].split(b"\0")))}


def _grown(step: Mapping[str, Any], size: int) -> int:
    """How many bytes, at most, a step makes of so many. That Unicode's own forms may be longer does not count."""
    if step["type"] == "Prepend":
        return size + len(step["prepend"].encode())
    if step["type"] == "Replace":
        content, literal = len(step["content"].encode()), len(step["pattern"].get("String", "").encode())
        # A regular expression, and an empty text, may match between any two characters.
        return max(size, -(-size * content // literal)) if literal else size + (size + 1) * content
    if step["type"] == "Table":
        return size * max(1, step["longest"] // 3)  # by Unicode's rules, what becomes longer has at least three bytes
    return size


def _messages(message: bytes, wanted: int) -> Iterator[bytes]:
    """The fields of that number of a protocol buffer, which are messages or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 2:
            size, at = _varint(message, at)
            if key >> 3 == wanted:
                yield message[at : at + size]
            at += size
        elif key & 7 == 0:
            _, at = _varint(message, at)
        else:
            at += 8 if key & 7 == 1 else 4


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    number = shift = 0
    while True:
        number |= (message[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 128:
            return number, at


def _find_tokenizer(path: Path) -> Path:
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such tokenizer; give a .model or tokenizer.json file or its directory")
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).exists():
                return _find_tokenizer(path / name)
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return _find_tokenizer(models[0])
        found = f"{len(models)} .model files" if models else "no tokenizer.json or tokenizer.model"
        raise InputError(f"{path}: holds {found}; name the tokenizer file")
    if path.suffix not in (".model", ".json"):
        raise InputError(f"{path}: a tokenizer is a .model (SentencePiece) or tokenizer.json file")
    return path


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    if (directory / "chat_template.jinja").exists():
        return read_text(directory / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
