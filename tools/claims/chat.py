r"""Instructions and memory over turns: what supervised fine-tuning teaches, asked before and after it.

python tools/claims/chat.py --workdir=DIR

Pre-training is on plain lines that hold the skills and the names, but no dialogue. Fine-tuning is on dialogues of the
kind `chat`: instructions on words (reverse, first, last, count) and talks in which a user gives a name, asks something
else, and asks for the name two turns later. Asked are word lists and pairs of first and last name that no dialogue of
fine-tuning has.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.tools.claims import runs, show

WORDS = "apple bird cloud door eagle flame grass house island jewel king lamp moon night ocean pearl".split()
NUMBERS = ("zero", "one", "two", "three", "four")
SKILLS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "reverse": ("Reverse: {}", lambda words: "It is " + " ".join(words[::-1])),
    "first": ("First of: {}", lambda words: f"It is {words[0]}"),
    "last": ("Last of: {}", lambda words: f"It is {words[-1]}"),
    "count": ("Count: {}", lambda words: f"It is {NUMBERS[len(words)]}"),
}
FIRST = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo June".split()
LAST = "Adler Berg Cole Diaz Ekman Frost Gray Holt Ito Jung".split()
NAMES = [f"{first} {last}" for first in FIRST for last in LAST]
_SHAPE, _HEADS, _ROOM = runs.Shape(64, 2), 4, 8
_TEXT_ROW, _CHAT_ROW = 16, 66
Messages = list[dict[str, str]]


def arguments(generator: random.Random, skill: str) -> list[str]:
    """Three different words; two to four where they are counted."""
    return generator.sample(WORDS, generator.randint(2, 4) if skill == "count" else 3)


def exercise(generator: random.Random) -> tuple[str, list[str]]:
    """A skill and words for it."""
    skill = generator.choice(list(SKILLS))
    return skill, arguments(generator, skill)


def instruction(skill: str, words: list[str]) -> Messages:
    form, answer = SKILLS[skill]
    return _turns(form.format(" ".join(words)), answer(words))


def memory(name: str, between: Messages) -> Messages:
    """The name comes first and is asked for last."""
    return [*_turns(f"My name is {name}", f"Hello {name}"), *between, *_turns("What is my name?", f"It is {name}")]


def _turns(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def lines(generator: random.Random, count: int) -> list[str]:
    """Plain text: what a skill makes of words, and names that come again."""
    texts = []
    for _ in range(count):
        skill, words = exercise(generator)
        name, word = generator.choice(NAMES), generator.choice(WORDS)
        texts.append(f"Of {' '.join(words)}, {skill}: {SKILLS[skill][1](words)}")
        texts.append(f"We saw {name} with a {word}. It is {name}.")
    return texts


def dialogues(generator: random.Random, count: int) -> tuple[dict[str, list[Messages]], list[Messages]]:
    """({what is asked: dialogues}, those of fine-tuning), which share neither word lists nor names."""
    names = generator.sample(NAMES, len(NAMES))
    new_names, known_names = names[:20], names[20:]
    new_lists: set[tuple[str, ...]] = set()
    asked: dict[str, list[Messages]] = {}
    for skill in SKILLS:
        lists = [arguments(generator, skill) for _ in range(64)]
        new_lists |= set(map(tuple, lists))
        asked[skill] = [instruction(skill, words) for words in lists]
    asked["name after a turn"] = [
        memory(name, instruction(*exercise(generator))) for name in new_names for _ in range(6)
    ]
    taught: list[Messages] = []
    while len(taught) < count:
        skill, words = exercise(generator)
        if tuple(words) not in new_lists:
            talk = instruction(skill, words)
            taught.append(talk if generator.random() < 0.6 else memory(generator.choice(known_names), talk))
    return asked, taught


def measure(model, tokenizer, asked: dict[str, list[Messages]]) -> dict[str, float]:
    """The share of last answers that are right."""
    found = {}
    for name, talks in asked.items():
        answers = runs.replies(model, tokenizer, [tokenizer.encode_chat(talk[:-1]) for talk in talks], _ROOM)
        found[name] = runs.share(answers, [talk[-1]["content"] for talk in talks])
    return found


def chat(workdir: Path, seeds: int, steps: int, count: int = 6000) -> str:
    """steps: of pre-training, and of fine-tuning."""
    texts = lines(random.Random(0), count // 2)
    asked, taught = dialogues(random.Random(1), count)
    said = [message["content"] for talk in taught[:500] for message in talk]
    text = [*texts, *said, *["user assistant", *NAMES] * 20]  # each word of a name becomes a token
    tokenizer = runs.tokenizer_of(workdir / "tokenizer.model", lambda path: train_tokenizer(text, path, 512))
    plain = runs.prepared(workdir / "text", tokenizer, _TEXT_ROW, items=texts, packing="document")
    talks = runs.prepared(workdir / "dialogues", tokenizer, _CHAT_ROW, kind="chat", items=taught)

    def cell(kind: str, seed: int) -> dict[str, Any]:
        place, base_place = workdir / f"{kind}-{seed}-{steps}", workdir / f"{kind}-{seed}-{steps}-base"
        config = runs.config_of(
            kind, _SHAPE, plain, row_length=_TEXT_ROW, steps=steps, batch_size=64, seed=seed, heads=_HEADS,
        )  # fmt: skip
        config.model.max_sequence_length = 2 * _CHAT_ROW
        base = runs.trained(config, base_place)
        before = measure(base, tokenizer, asked)
        config = runs.config_of(
            kind, _SHAPE, talks, row_length=_CHAT_ROW, steps=steps, batch_size=24, chat=True, init_from=base_place,
            seed=seed, heads=_HEADS,
        )  # fmt: skip
        return {"before": before, "after": measure(runs.trained(config, place), tokenizer, asked)}

    return conclude(workdir, runs.of_both(workdir, seeds, {"steps": steps}, cell))


def conclude(workdir: Path, found: Sequence[dict[str, Any]]) -> str:
    names = list(found[0]["after"])
    shares = {
        (kind, when): runs.values(found, when, names)[kind] for kind in runs.KINDS for when in ("before", "after")
    }
    rows = [(runs.KINDS[kind], when, *map(show.spread, shares[kind, when].T)) for kind, when in shares]
    drawn, axes = show.figure()
    for i, ((kind, when), of_seeds) in enumerate(shares.items()):
        place = np.arange(len(names)) + 0.2 * (i - 1.5)
        label, alpha = f"{runs.KINDS[kind]}, {when}", 0.4 if when == "before" else 1.0
        axes.bar(place, of_seeds.mean(axis=0), 0.18, color=show.COLORS[kind], alpha=alpha, label=label)
        for run in of_seeds:
            axes.plot(place, run, ".", color="black", markersize=3)
    axes.set(xticks=np.arange(len(names)), yticks=np.linspace(0, 1, 6), ylabel="right", ylim=(0, 1.3))
    axes.set_xticklabels([name.replace(" after", "\nafter") for name in names])
    axes.legend(frameon=False, ncols=2, loc="upper right")
    show.save(drawn, workdir / "chat.svg")
    llada, arm = (shares[kind, "after"].mean(axis=0) for kind in runs.KINDS)
    said = (
        f"After fine-tuning LLaDA follows {llada[:-1].mean():.0%} of the new instructions (before: "
        f"{shares['llada', 'before'].mean(axis=0)[:-1].mean():.0%}) and recalls {llada[-1]:.0%} of the new names; the "
        f"control {arm[:-1].mean():.0%} and {arm[-1]:.0%}."
    )
    (workdir / "chat.md").write_text(f"{show.table(('model', 'tuned', *names), rows)}\n\n{said}\n", encoding="utf-8")
    return said


def main(_argv: list[str]) -> None:
    print(chat(runs.opened(flags.FLAGS.workdir), flags.FLAGS.seeds, flags.FLAGS.steps))


if __name__ == "__main__":
    runs.define_flags()
    flags.DEFINE_integer("steps", 3000, "Of pre-training, and of fine-tuning.", lower_bound=1)
    cli.run(main)
