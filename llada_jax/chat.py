"""Chat in the terminal: the answer appears as it is denoised, each token in the colour of its probability.

python -m llada_jax.chat --checkpoint=runs/chat --gen_length=64 --threshold=0.9
echo 'What is a mask?' | python -m llada_jax.chat --checkpoint=runs/chat

Away from a terminal every line of the input is a message, and only the answers are printed. On a terminal /help lists
the commands, and Ctrl-C stops an answer.
"""

import sys
from pathlib import Path

from absl import flags

from llada_jax import cli
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.sampling import options
from llada_jax.serving import settings
from llada_jax.serving.dialogue import Dialogue
from llada_jax.serving.engine import open_engine
from llada_jax.serving.pieces import pieces
from llada_jax.serving.terminal import DIM, RESET, Screen

_HELP = """/settings [NAME VALUE]  show all settings, or change one; VALUE none: its default
/undo                   forget the last message and its answer      /new        forget all of them
/save FILE              write the dialogue as a line of JSON        /load FILE  continue such a dialogue
/quit                   end, as Ctrl-D does; Ctrl-C stops an answer"""


def _show(chat: Dialogue, text: str) -> None:
    """Sends a message from a terminal and draws what comes; Ctrl-C leaves what is drawn, and forgets the message."""
    screen, last = Screen(), None
    try:
        for last in chat.answer(text):
            screen.draw(pieces(chat.engine.tokenizer, last.tokens, last.probability, last.step))
    except KeyboardInterrupt:
        print(f"\r{DIM}stopped; the message is forgotten{RESET}")
        return
    assert last is not None
    print(f"{DIM}{last.speed()}{RESET}")


def command_line(chat: Dialogue, line: str) -> str | None:
    """Does what a line that begins with / says; returns what to print, None to end. Raises InputError."""
    name, *words = line.split()
    rest = line[len(name) :].strip()
    match name, len(words):
        case "/settings", 0:
            return settings.described(chat.settings)
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


def _talk(chat: Dialogue) -> None:
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


def _read(chat: Dialogue) -> None:
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
    if not hf.is_instruct(flags.FLAGS.checkpoint):
        cli.say(f"{flags.FLAGS.checkpoint}: was not trained on dialogues, so expect continuations, not answers")
    given = options.of_flags()
    with open_engine(flags.FLAGS.checkpoint, given, flags.FLAGS.gen_length, seed=flags.FLAGS.seed) as engine:
        chat = Dialogue(engine, engine.settings)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _talk(chat)
        else:
            _read(chat)


def command() -> None:
    """The console script llada-chat."""
    settings.define_flags()
    cli.run(main)


if __name__ == "__main__":
    command()
