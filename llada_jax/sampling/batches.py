"""Many requests: batched by width, each answer handed over as soon as it is there.

A request is a completion, a reply to messages, or a text with masks in it. What it is answered does not depend on the
batch that it lies in.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada_jax import inputs
from llada_jax.data import sources
from llada_jax.fields import InputError
from llada_jax.sampling import prompts
from llada_jax.sampling.cache import prepare
from llada_jax.sampling.generate import Stats, _completion, _infilling, _program_width


@dataclasses.dataclass(frozen=True)
class Request:
    """number: by which its noise is drawn. ids: of the prompt, or with `infill` of the whole text. shown: columns that
    belong to the prompt and are left out of the answer."""

    number: int
    ids: list[int]
    infill: bool = False
    chat: bool = False

    @property
    def shown(self) -> int:
        return 1 if self.infill or not self.chat else len(self.ids)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request got: its text, and row `row` of the batch that it was in."""

    request: Request
    stats: Stats
    row: int
    columns: slice  # of the row: the answer, with a plain prompt or the text that was infilled
    text: str


def make_request(tokenizer, number: int, value: Any, where: str, chat: bool, gen_length: int | None) -> Request:
    """A request from a text, {"prompt": text}, {"messages": [...]} or {"text": text with [MASK*N]}.

    chat: plain prompts are messages of a user. A prompt with masks is infilled unless gen_length is given. Raises
    InputError that says `where` it stood.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    kinds = [name for name in ("prompt", "messages", "text") if isinstance(value, dict) and name in value]
    if len(kinds) != 1:
        raise InputError(f'{where}: needs a text, or one of "prompt", "messages" and "text"')
    content = value[kinds[0]]
    if kinds[0] == "messages":
        return Request(number, tokenizer.encode_chat(prompts.check_turns(content, where)), chat=True)
    if not isinstance(content, str) or not content:
        raise InputError(f'{where}: "{kinds[0]}" must be a text that is not empty')
    if chat and kinds[0] == "prompt":
        return Request(number, tokenizer.encode_chat([{"role": "user", "content": content}]), chat=True)
    ids = prompts.encode_prompt(tokenizer, content)
    masked = tokenizer.mask_id in ids
    if kinds[0] == "text" and not masked:
        raise InputError(f"{where}: the text has no [MASK] to fill")
    infill = kinds[0] == "text" or (masked and not gen_length)
    return Request(number, [*ids, tokenizer.eos_id] if infill else ids, infill)


def read_requests(path: str, tokenizer, chat: bool, gen_length: int | None) -> Iterator[tuple[Any, Request]]:
    """(value, request) of each line of a JSONL file, or of standard input for "-"."""
    for number, (where, value) in enumerate(sources.json_lines("/dev/stdin" if path == "-" else path)):
        yield value, make_request(tokenizer, number, value, where, chat, gen_length)


def answer_all(
    model, tokenizer, requests: Sequence[Request], options: dict[str, Any], *, gen_length: int = 32,
    batch_size: int = 8, on_answer: Callable[[Answer], object],
) -> None:  # fmt: skip
    """Answers every request and hands each to `on_answer`, a batch after the other.

    Batches hold requests of one width, the longest first, and are filled up with copies: one program serves all of one
    width. batch_size: rows of a batch, at least.
    """
    weights = prepare(model)
    groups: dict[tuple[bool, int], list[Request]] = collections.defaultdict(list)
    for request in requests:
        length = len(request.ids) + (0 if request.infill else gen_length)
        groups[request.infill, _program_width(length, 1)].append(request)
    for (infill, _), group in sorted(groups.items(), key=lambda item: -item[0][1]):
        rows = min(batch_size, 2 ** math.ceil(math.log2(len(group))))
        for start in range(0, len(group), rows):
            batch = group[start : start + rows]
            for answer in _answer_batch(weights, tokenizer, batch, rows, infill, gen_length, options):
                on_answer(answer)


def _answer_batch(weights, tokenizer, batch: list[Request], rows: int, infill, gen_length, options) -> Iterable[Answer]:
    filled = [batch[i % len(batch)] for i in range(rows)]
    tokens, real = inputs.left_pad([request.ids for request in filled], tokenizer.pad_id)
    numbers = [request.number for request in filled]
    if infill:
        stats = _infilling(weights, tokens, real, options, numbers).run()
    else:
        stats = _completion(weights, tokens, real, gen_length, options, numbers).run()
    found = np.asarray(stats.tokens)
    for row, request in enumerate(batch):
        length = len(request.ids) + (0 if infill else gen_length)
        columns = slice(found.shape[1] - length + request.shown, None)
        ids = found[row, columns]
        text = prompts.reply_text(tokenizer, ids) if request.chat else tokenizer.decode(ids)
        yield Answer(request, stats, row, columns, text)


def answered(path: Path) -> set[int]:
    """The numbers of the requests whose answers are in a file; what a kill left of the last line is cut off."""
    if not path.exists():
        return set()
    done, good = set(), 0
    with path.open("rb") as file:
        for line in file:
            try:
                done.add(int(json.loads(line)["index"]))
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{path}: holds other lines than answers; choose another --output") from error
                break
            good += len(line)
    with path.open("rb+") as file:
        file.truncate(good)
    return done
