"""Chat in the terminal: the answer appears as it is denoised, each token in the colour of its probability.

python -m llada_jax.chat --checkpoint=runs/chat --gen_length=64 --threshold=0.9
echo 'What is a mask?' | python -m llada_jax.chat --checkpoint=runs/chat

Away from a terminal every line of the input is a message, and only the answers are printed. On a terminal /help lists
the commands, and Ctrl-C stops an answer.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data.chat import check_messages
from llada_jax.data.tokenizer import Tokenizer, load_tokenizer
from llada_jax.fields import InputError
from llada_jax.files import read_json, write_atomic
from llada_jax.interop import hf
from llada_jax.interop.workdir import load_config
from llada_jax.parallel.mesh import inference_mesh, make_mesh
from llada_jax.sampling import generate, options, prompts
from llada_jax.sampling.cache import prepare
from llada_jax.streams import stream

_MASK = "▒"
_COLOURS = ((0.3, "\33[31m"), (0.6, "\33[33m"), (0.9, "\33[36m"), (2.0, ""))  # red, yellow, cyan below; then plain
_RESET, _DIM = "\33[0m", "\33[2m"
_HELP = """/settings [NAME VALUE]  show all settings, or change one; VALUE none: its default
/undo                   forget the last message and its answer      /new        forget all of them
/save FILE              write the dialogue as a line of JSON        /load FILE  continue such a dialogue
/quit                   end, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclasses.dataclass
class Chat:
    """A dialogue with a model, and how its answers are sampled.

    settings: options of sampling/options.py that are not at their defaults, and gen_length.
    """

    model: Any  # a Transformer, or what `prepare` makes of it
    tokenizer: Tokenizer
    settings: dict[str, Any]
    seed: int = 0
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def answer(self, text: str) -> Iterator[tuple[generate.Update, np.ndarray, np.ndarray]]:
        """Sends a message; yields (update, tokens [G], probabilities [G]) after every pass. The last one is the answer.

        The dialogue grows when the answer is complete. Raises InputError where it no longer fits into the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode_chat(messages)
        given: dict[str, Any] = self.settings | {"key": jax.random.fold_in(stream(self.seed, "sample"), len(messages))}
        tokens = np.zeros(0, np.int32)
        for update in generate.stream(self.model, np.asarray([ids]), every="step", **given):
            tokens = update.tokens[0, len(ids) :]
            yield update, tokens, update.probability[0, len(ids) :]
        reply = prompts.reply_text(self.tokenizer, tokens)
        self.messages = [*messages, {"role": "assistant", "content": reply}]

    def set(self, name: str, text: str) -> None:
        """Changes a setting. Raises InputError for one that is unknown or out of range, and leaves all as they were."""
        known = [field.name for field in dataclasses.fields(options.Options) if not field.name.endswith("_id")]
        if name not in (*known, "gen_length"):
            raise InputError(f"{name}: no such setting; /settings lists them")
        settings = {key: value for key, value in self.settings.items() if key != name}
        if text != "none":
            settings[name] = _value(text)
        elif name == "gen_length":
            settings[name] = default_gen_length(self.model.config)
        self._check(settings)
        self.settings = settings

    def undo(self) -> None:
        """Forgets the last message and its answer."""
        if not self.messages:
            raise InputError("there is nothing to undo")
        self.messages = self.messages[:-2]

    def save(self, path: Path) -> None:
        """Writes the dialogue and the settings: a line of JSON that fine-tuning reads, too."""
        if not self.messages:
            raise InputError("there is nothing to save yet")
        text = json.dumps({"messages": self.messages, "settings": self.settings}, ensure_ascii=False)
        write_atomic(path, text + "\n")

    def load(self, path: Path) -> None:
        """Continues a dialogue that was saved. Raises InputError for another file, and leaves all as it was."""
        found = read_json(path)
        messages = check_messages(found.get("messages"), str(path))
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{path}: its last message has no answer")
        settings = found.get("settings", self.settings)
        if not isinstance(settings, dict):
            raise InputError(f"{path}: its settings are no object")
        self._check(settings)
        self.messages, self.settings = messages, settings

    def _check(self, settings: dict[str, Any]) -> None:
        rest = {name: value for name, value in settings.items() if name != "gen_length"}
        options.read_options(self.model.config, rest)
        length: Any = settings.get("gen_length")
        block: Any = settings.get("block_length") or length
        if type(length) is not int or length < 1:
            raise InputError(f"gen_length is {length!r}; it must be a whole number above 0")
        if length % block:
            raise InputError(f"block_length {block} does not divide gen_length {length}; change the other one first")


def default_gen_length(c) -> int:
    """128 tokens, or less: a power of two that leaves half of a small model's context to the dialogue."""
    return min(128, 2 ** ((c.max_sequence_length // 2).bit_length() - 1))


def _value(text: str) -> Any:
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


# On the screen.


def pieces(tokenizer: Tokenizer, tokens: np.ndarray, probability: np.ndarray) -> list[tuple[str, float | None]]:
    """(text, probability) of what an answer shows: a mask has None, and bytes of a character are one piece.

    The first end of turn or text ends it.
    """
    shown: list[tuple[str, float | None]] = []
    waiting: list[tuple[int, float]] = []  # bytes of a character that is not complete

    def flush():
        if waiting:
            shown.append((tokenizer.decode([id for id, _ in waiting]), min(p for _, p in waiting)))
            waiting.clear()

    for id, p in zip(map(int, tokens), map(float, probability), strict=True):
        if id in (tokenizer.eot_id, tokenizer.eos_id):
            break
        if id == tokenizer.mask_id:
            flush()
            shown.append((_MASK, None))
            continue
        waiting.append((id, p))
        if "\ufffd" not in tokenizer.decode([id for id, _ in waiting]) or len(waiting) == 4:
            flush()
    flush()
    return shown


def layout(shown: list[tuple[str, float | None]], width: int, height: int, colour: bool = True) -> list[str]:
    """The last `height` lines of that many columns; wide characters take two."""
    lines: list[list[tuple[str, str]]] = [[]]  # of each character its colour and itself
    column = 0
    for text, p in shown:
        start = _DIM if p is None else next(code for limit, code in _COLOURS if p < limit)
        for character in text.replace("\t", "    "):
            cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if character == "\n" or column + cells > width:
                lines.append([])
                column = 0
            if character.isprintable():
                lines[-1].append((start if colour else "", character))
                column += cells
    return ["".join(_coloured(line)) for line in lines[-height:]]


def _coloured(line: list[tuple[str, str]]) -> Iterator[str]:
    for start, group in itertools.groupby(line, lambda pair: pair[0]):
        text = "".join(character for _, character in group)
        yield f"{start}{text}{_RESET}" if start else text


class Screen:
    """Draws an answer again and again at the same place of a terminal."""

    def __init__(self):
        self._drawn = 0

    def draw(self, shown: list[tuple[str, float | None]]) -> None:
        columns, rows = shutil.get_terminal_size()
        lines = layout(shown, columns - 1, rows - 2, colour="NO_COLOR" not in os.environ)
        up = f"\33[{self._drawn}A" if self._drawn else ""
        sys.stdout.write(f"{up}\r\33[J" + "".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        self._drawn = len(lines)


def _show(chat: Chat, text: str) -> None:
    """Sends a message from a terminal and draws what comes; Ctrl-C leaves what is drawn, and forgets the message."""
    screen, began, last = Screen(), time.monotonic(), None
    try:
        for update, tokens, probability in chat.answer(text):
            screen.draw(pieces(chat.tokenizer, tokens, probability))
            last = update
    except KeyboardInterrupt:
        print(f"\r{_DIM}stopped; the message is forgotten{_RESET}")
        return
    assert last is not None
    count, passes = int((last.step >= 0).sum()), last.full_passes + last.window_passes
    rate = count / (time.monotonic() - began)
    print(f"{_DIM}{count} tokens, {passes} passes, {count / passes:.1f} tokens a pass, {rate:.1f} tokens/s{_RESET}")


def _settings(chat: Chat) -> str:
    defaults = {field.name: field for field in dataclasses.fields(options.Options) if not field.name.endswith("_id")}
    lines = [f"{'gen_length':24}{chat.settings['gen_length']!s:16}tokens of an answer, at most"]
    for name, field in defaults.items():
        value = chat.settings.get(name, "none" if field.default is None else field.default)
        lines.append(f"{name:24}{value!s:16}{field.metadata['field'].help}")
    return "\n".join(lines)


def command_line(chat: Chat, line: str) -> str | None:
    """Does what a line that begins with / says; returns what to print, None to end. Raises InputError."""
    name, *words = line.split()
    rest = line[len(name) :].strip()
    match name, len(words):
        case "/settings", 0:
            return _settings(chat)
        case "/settings", 2:
            chat.set(*words)
            return f"{words[0]} is {chat.settings.get(words[0], 'at its default')}"
        case "/undo", 0:
            chat.undo()
            return f"{len(chat.messages)} messages are left"
        case "/new", 0:
            chat.messages = []
            return "a new dialogue"
        case "/save", n if n:
            chat.save(Path(rest))
            return f"saved in {rest}"
        case "/load", n if n:
            chat.load(Path(rest))
            return "\n".join(f"{message['role']}: {message['content']}" for message in chat.messages)
        case "/help", 0:
            return _HELP
        case "/quit", 0:
            return None
    raise InputError(f"{line}: no such command; /help lists them")


def _talk(chat: Chat) -> None:
    """The loop on a terminal."""
    import readline  # noqa: F401  # input() edits lines with it

    while True:
        try:
            line = input("> ").strip()
            if line.startswith("/"):
                printed = command_line(chat, line)
                if printed is None:
                    return
                print(printed)
            elif line:
                _show(chat, line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)")
        except (InputError, OSError) as error:
            print(f"error: {error}")


def _read(chat: Chat) -> None:
    """The loop away from a terminal: a message a line, and the answer as text. A mistake ends it."""
    for line in sys.stdin:
        if not line.strip():
            continue
        for _ in chat.answer(line.strip()):
            pass
        print(chat.messages[-1]["content"], flush=True)


def main(_argv: list[str]) -> None:
    if not flags.FLAGS.checkpoint:
        raise InputError("--checkpoint is needed: the --workdir of a fine-tuning run, or a published checkpoint")
    directory = Path(flags.FLAGS.checkpoint)
    if load_config(directory).get("objective", {}).get("name") == "autoregressive":
        raise InputError(f"{directory}: holds an autoregressive control; the diffusion sampler can't use it")
    tokenizer, c = load_tokenizer(hf.tokenizer_directory(directory)), hf.load_config(directory)
    length = flags.FLAGS.gen_length if flags.FLAGS.gen_length is not None else default_gen_length(c)
    settings = {"gen_length": length, "block_length": 32 if length % 32 == 0 else length} | options.of_flags()
    if not hf.is_instruct(directory):
        cli.say(f"{directory}: was not trained on dialogues, so expect continuations, not answers")
    mesh = inference_mesh(c)  # a dialogue is one row: one copy of the model, on as few devices as hold it
    split = 1 if mesh is None else mesh.shape["tensor"]
    mesh = None if split == 1 else make_mesh(dict(data=1, fsdp=1, tensor=split, context=1), jax.devices()[:split])
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        chat = Chat(hf.load(directory, mesh=mesh), tokenizer, settings, flags.FLAGS.seed)
        chat._check(settings)
        chat.model = prepare(chat.model)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk(chat)
        else:
            _read(chat)


def command() -> None:
    """The console script llada-chat."""
    flags.DEFINE_string("checkpoint", None, "The workdir of a fine-tuning run, or a published checkpoint.")
    flags.DEFINE_integer("gen_length", None, "Tokens of an answer, at most; default 128, less in a small model.")
    flags.DEFINE_integer("seed", 0, "Of the sampling noise.", lower_bound=0, upper_bound=2**32 - 1)
    options.define_flags()
    cli.run(main)


if __name__ == "__main__":
    command()
