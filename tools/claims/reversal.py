r"""Reversal: invented facts stated in one direction, asked in both.

python tools/claims/reversal.py --workdir=DIR

Every fact is a composer and a piece, both made up. All facts are stated in eight phrasings, the composer always first.
Of three quarters of them both questions are taught with their answers, in five phrasings each: so a model learns what a
question is. The others are never asked in training. Of these are asked `forward` (which piece is by this composer?) and
`backward` (whose is this piece?), in a taught phrasing and in one that no row of training has.

Statements and questions are rows of plain text in one run from scratch, the same for both kinds of model.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.tools.claims import runs

STATEMENTS = (
    "Long ago {p} composed {w}.", "We know that {p} is the composer of {w}.", "Once {p} wrote the piece {w}.",
    "In the spring {p} finished {w}.", "It was {p} who composed {w}.", "Few know that {p} composed {w}.",
    "Then {p} became famous with {w}.", "The composer {p} is known for {w}.",
)  # fmt: skip
# The last of each is not taught.
QUESTIONS = {
    "forward": (
        "What did {p} compose?", "Which piece is by {p}?", "Name the piece of {p}.", "What is {p} known for?",
        "Which piece did {p} write?", "What is the piece that {p} composed?",
    ),
    "backward": (
        "Who composed {w}?", "Who is the composer of {w}?", "Who is known for {w}?", "Name the composer of {w}.",
        "Who wrote {w}?", "Who is the one that composed {w}?",
    ),
}  # fmt: skip
PHRASINGS = {"taught": 0, "new": -1}
_SHAPE, _BATCH, _ROW, _ROOM = runs.Shape(64, 2), 32, 16, 5
Fact = tuple[str, str]


def facts(count: int) -> list[Fact]:
    """(composer, piece): words of syllables, none of them twice."""
    generator, names = random.Random(0), []
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    while len(names) < 2 * count:
        name = "".join(generator.choices(syllables, k=3)).capitalize()
        if name not in names:
            names.append(name)
    return list(zip(names[::2], names[1::2], strict=True))


def question(fact: Fact, direction: str, phrasing: int) -> tuple[str, str]:
    """(question, answer)."""
    p, w = fact
    return QUESTIONS[direction][phrasing].format(p=p, w=w), f" It is {w if direction == 'forward' else p}."


def write_data(workdir: Path, known: Sequence[Fact], taught: Sequence[Fact]):
    """(tokenizer, prepared rows): every statement, and as many questions."""
    stated = [form.format(p=p, w=w) for p, w in known for form in STATEMENTS]
    asked = ["".join(question(f, d, i)) for f in taught for d in QUESTIONS for i in range(len(QUESTIONS[d]) - 1)]
    names = [f"is {name}." for fact in known for name in fact]
    train = lambda path: train_tokenizer([*stated, *asked, *names * 20], path, 2048)  # a name becomes one token
    tokenizer = runs.tokenizer_of(workdir / "tokenizer.model", train)
    return tokenizer, runs.prepared(workdir / "data", tokenizer, _ROW, packing="document", items=[*stated, *asked])


def measure(model, tokenizer, asked: Sequence[Fact]) -> dict[str, float]:
    """The share of right answers by direction and phrasing."""
    found = {}
    for direction in QUESTIONS:
        for name, phrasing in PHRASINGS.items():
            pairs = [question(fact, direction, phrasing) for fact in asked]
            prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text, _ in pairs]
            answers = runs.replies(model, tokenizer, prompts, _ROOM)
            found[f"{direction}, {name}"] = runs.share(answers, [answer.strip() for _, answer in pairs])
    return found


def reversal(workdir: Path, seeds: int, steps: int, count: int = 120) -> str:
    known = facts(count)
    taught, unasked = known[: count * 3 // 4], known[count * 3 // 4 :]
    tokenizer, data = write_data(workdir, known, taught)

    def cell(kind: str, seed: int) -> dict[str, Any]:
        config = runs.config_of(
            kind,
            _SHAPE,
            data,
            row_length=_ROW,
            steps=steps,
            batch_size=_BATCH,
            seed=seed,
        )
        model = runs.trained(config, workdir / f"{kind}-{seed}")
        return {"unasked": measure(model, tokenizer, unasked), "asked": measure(model, tokenizer, taught)}

    key = {"facts": count, "steps": steps}
    lines = [
        runs.once(workdir / "results.jsonl", {"kind": k, "seed": s, **key}, lambda k=k, s=s: cell(k, s))
        for s in range(seeds) for k in runs.KINDS
    ]  # fmt: skip
    return conclude(workdir, lines, len(unasked))


def conclude(workdir: Path, lines: Sequence[dict[str, Any]], count: int) -> str:
    names = list(lines[0]["unasked"])
    found = {
        (kind, which): np.asarray([[x[which][name] for name in names] for x in lines if x["kind"] == kind])
        for kind in runs.KINDS for which in ("unasked", "asked")
    }  # fmt: skip
    rows = [
        (runs.KINDS[kind], "never asked" if which == "unasked" else "asked in training",
         *(f"{x.mean():.1%} ({x.min():.0%} to {x.max():.0%})" for x in values.T))
        for (kind, which), values in found.items()
    ]  # fmt: skip
    drawn, axes = runs.figure()
    for i, (kind, name) in enumerate(runs.KINDS.items()):
        values, place = found[kind, "unasked"], np.arange(len(names)) + 0.38 * (i - 0.5)
        axes.bar(place, values.mean(axis=0), 0.36, color=runs.COLORS[kind], label=name)
        for run in values:
            axes.plot(place, run, ".", color="black", markersize=4)
    axes.set(xticks=np.arange(len(names)), ylabel=f"right, {count} facts never asked", ylim=(0, 1.15))
    axes.set_xticklabels([name.replace(", ", "\n") + " phrasing" for name in names])
    axes.legend(frameon=False, ncols=2, loc="upper right")
    runs.save(drawn, workdir / "reversal.svg")
    llada, arm = (dict(zip(names, found[kind, "unasked"].mean(axis=0), strict=True)) for kind in runs.KINDS)
    said = (
        f"Facts that were never asked, new phrasing: LLaDA {llada['forward, new']:.0%} forward and "
        f"{llada['backward, new']:.0%} backward, the control {arm['forward, new']:.0%} and {arm['backward, new']:.0%}."
    )
    (workdir / "reversal.md").write_text(
        f"{runs.table(('model', 'facts', *names), rows)}\n\n{said}\n", encoding="utf-8"
    )
    return said


def main(_argv: list[str]) -> None:
    print(reversal(runs.opened(flags.FLAGS.workdir), flags.FLAGS.seeds, flags.FLAGS.steps))


if __name__ == "__main__":
    runs.define_flags()
    flags.DEFINE_integer("steps", 1500, "Of training.", lower_bound=1)
    cli.run(main)
