r"""In-context learning: a map from letters to letters is drawn for each prompt, and read off the examples in it.

python tools/claims/context.py --workdir=DIR

A line is up to eight examples of a map of six letters onto six capitals, a random permutation, and one to four pairs
of a letter and its capital: ` aD cF aD eB c F`. An example is one token, the letter and the capital of a pair are two.
Asked is the capital that follows n examples and a letter. No parameter can know the map of a line. The best that is
possible is to repeat what was shown of the letter, and to guess among the capitals that were not shown otherwise.

Half of the lines of training have one map, aA bB cC dD eE fF, and of those that are asked as many as chance brings.
They teach early that a capital depends on the letter before it.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.tools.claims import runs, show

LETTERS, CAPITALS = "abcdef", "ABCDEF"
EXAMPLES, _PAIRS = tuple(range(9)), 4
_SHAPE, _HEADS, _BATCH = runs.Shape(64, 2), 4, 64
_ROW, _ROOM = EXAMPLES[-1] + 2 * _PAIRS + 2, 2  # with BOS and EOS


def line(generator: random.Random, examples: int, pairs: int, capitals: Sequence[str] = ()) -> str:
    """So many examples and pairs of the map onto these capitals, or of a random one."""
    capital = dict(zip(LETTERS, capitals or generator.sample(CAPITALS, len(CAPITALS)), strict=True))
    drawn = generator.choices(LETTERS, k=examples + pairs)
    shown = [f" {x}{capital[x]}" for x in drawn[:examples]]
    return "".join(shown + [f" {x} {capital[x]}" for x in drawn[examples:]])


def corpus(generator: random.Random, lines: int) -> list[str]:
    """Lines of random maps, then as many of the usual one."""
    count = lambda: (generator.choice(EXAMPLES), generator.randint(1, _PAIRS))
    maps = [()] * (lines // 2) + [CAPITALS] * (lines // 2)
    return [line(generator, *count(), capitals) for capitals in maps]


def best(examples: int) -> float:
    """The accuracy of the best guesser.

    With K of the N letters shown it is right for these, K/N, and for one of the others where there is one: 1/N.
    """
    letters, shown = len(LETTERS), np.zeros(len(LETTERS) + 1)
    shown[0] = 1.0  # the distribution of K
    for _ in range(examples):
        stay = shown * np.arange(letters + 1) / letters
        shown = stay + np.roll(shown - stay, 1)
    return float(shown @ np.arange(letters + 1) + 1 - shown[letters]) / letters


def measure(model, tokenizer, questions: int) -> dict[str, Any]:
    """{"accuracy": of each number of examples}."""
    generator, accuracy = random.Random(1), []
    for examples in EXAMPLES:
        lines = [line(generator, examples, 1) for _ in range(questions)]
        asked = [[tokenizer.bos_id, *tokenizer.encode(text[:-2])] for text in lines]
        answers = runs.replies(model, tokenizer, asked, _ROOM)
        accuracy.append(runs.share([text.strip()[:1] for text in answers], [text[-1] for text in lines]))
    return {"accuracy": accuracy}


def context(workdir: Path, seeds: int, steps: int, questions: int = 512, lines: int = 50_000) -> str:
    texts = corpus(random.Random(0), lines)
    words = [f" {x}{y} {x} {y}" for x in LETTERS for y in CAPITALS] * 20  # each becomes a token
    tokenizer = runs.tokenizer_of(workdir / "tokenizer.model", lambda path: train_tokenizer(words, path, 384))
    data = runs.prepared(workdir / "data", tokenizer, _ROW, items=texts, packing="document")

    def cell(kind: str, seed: int) -> dict[str, Any]:
        config = runs.config_of(
            kind, _SHAPE, data, row_length=_ROW, steps=steps, batch_size=_BATCH, seed=seed, heads=_HEADS
        )
        return measure(runs.trained(config, workdir / f"{kind}-{seed}-{steps}"), tokenizer, questions)

    return conclude(workdir, runs.of_both(workdir, seeds, {"steps": steps, "questions": questions}, cell))


def conclude(workdir: Path, lines: Sequence[dict[str, Any]]) -> str:
    by_kind = {kind: np.asarray([x["accuracy"] for x in lines if x["kind"] == kind]) for kind in runs.KINDS}
    ideal = [best(n) for n in EXAMPLES]
    rows = [
        (n, *(show.spread(found[:, i]) for found in by_kind.values()), f"{ideal[i]:.0%}")
        for i, n in enumerate(EXAMPLES)
    ]
    drawn, axes = show.figure()
    axes.plot(EXAMPLES, ideal, ":", color="black", label="best possible")
    for kind, name in runs.KINDS.items():
        found, color = by_kind[kind], show.COLORS[kind]
        axes.plot(EXAMPLES, found.mean(axis=0), "o-", color=color, markersize=4, label=name)
        axes.fill_between(EXAMPLES, found.min(axis=0), found.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="examples in the prompt", ylabel="right", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="upper left")
    show.save(drawn, workdir / "context.svg")
    llada, arm = (found[:, -1].mean() for found in by_kind.values())
    said = (
        f"From {by_kind['llada'][:, 0].mean():.0%} without an example LLaDA comes to {llada:.0%} at {EXAMPLES[-1]}, "
        f"the control from {by_kind['arm'][:, 0].mean():.0%} to {arm:.0%}; possible are {ideal[-1]:.0%}."
    )
    head = ("examples", *runs.KINDS.values(), "best possible")
    (workdir / "context.md").write_text(f"{show.table(head, rows)}\n\n{said}\n", encoding="utf-8")
    return said


def main(_argv: list[str]) -> None:
    print(context(runs.opened(flags.FLAGS.workdir), flags.FLAGS.seeds, flags.FLAGS.steps))


if __name__ == "__main__":
    runs.define_flags()
    flags.DEFINE_integer("steps", 8000, "Of training.", lower_bound=1)
    cli.run(main)
