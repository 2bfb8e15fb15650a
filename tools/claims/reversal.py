r"""Reversal: invented facts stated in one direction, asked in both.

python tools/claims/reversal.py --workdir=DIR

Every fact is a composer and a piece, both made up. All facts are stated in twelve phrasings, the composer always first.
Of five sixths of them both questions are taught with their answers, in five phrasings each: so a model learns what a
question is, and that it is answered in a whole sentence (`Who composed Baki? Momu composed Baki.`). The others are
never asked in training. Of these are asked `forward` (which piece is by this composer?) and `backward` (whose is this
piece?), in a taught phrasing and in one that no row of training has. An answer is right that names in its place what
was asked for, the piece or the composer; what it copies of the question is not judged.

In a statement the composer is also hidden. LLaDA fills the hole. The control cannot; what both can do is to rank all
composers: LLaDA by their probability in the hole, the control by that of the whole statement.

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
from llada_jax.sampling.generate import infill
from llada_jax.tools.claims import runs, show

STATEMENTS = (
    "So {p} composed {w}.", "Once {p} wrote the piece {w}.", "Here {p} at last finished {w}.", "Then {p} created {w}.",
    "Thus {p} wrote all of {w}.", "At last {p} played the piece {w}.", "Once {p} finished the piece {w}.",
    "What {p} wrote is {w}.", "What {p} created at last is {w}.", "So {p} played {w}.", "Then {p} composed all of {w}.",
    "The piece that {p} finished is {w}.",
)  # fmt: skip
# The last of each is not taught, but its words are.
QUESTIONS = {
    "forward": (
        "What did {p} compose?", "What did {p} create at last?", "Which piece is by {p}?", "What has {p} finished?",
        "Which piece has {p} played?", "Which piece did {p} compose?",
    ),
    "backward": (
        "Who composed {w}?", "Who at last created {w}?", "By whom is the piece {w}?", "Who has finished {w}?",
        "Who played the piece {w}?", "Who finished the piece {w}?",
    ),
}  # fmt: skip
ANSWER = " {p} composed {w}."
FACTS = {"unasked": "never asked", "asked": "asked in training"}
PHRASINGS = {"taught": 0, "new": -1}
_SHAPE, _BATCH, _ROW, _ROOM = runs.Shape(64, 2), 128, 14, 5
Fact = tuple[str, str]


def facts(count: int) -> list[Fact]:
    """(composer, piece): words of syllables, none of them twice."""
    generator, names = random.Random(0), []
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    while len(names) < 2 * count:
        name = "".join(generator.choices(syllables, k=2)).capitalize()
        if name not in names:
            names.append(name)
    return list(zip(names[::2], names[1::2], strict=True))


def question(fact: Fact, direction: str, phrasing: int) -> tuple[str, str]:
    """(question, answer)."""
    p, w = fact
    return QUESTIONS[direction][phrasing].format(p=p, w=w), ANSWER.format(p=p, w=w)


def named(answer: str, direction: str) -> str:
    """What a sentence says to the question: its last word (the piece) or its first (the composer)."""
    words = answer.strip().removesuffix(".").split() or [""]
    return words[-1] if direction == "forward" else words[0]


def write_data(workdir: Path, known: Sequence[Fact], taught: Sequence[Fact]):
    """(tokenizer, prepared rows): every statement, and as many questions."""
    stated = [form.format(p=p, w=w) for p, w in known for form in STATEMENTS]
    asked = ["".join(question(f, d, i)) for f in taught for d in QUESTIONS for i in range(len(QUESTIONS[d]) - 1)]
    names = [f"is {name}." for fact in known for name in fact]
    train = lambda path: train_tokenizer([*stated, *asked, *names * 20], path, 1024)  # a name becomes one token
    tokenizer = runs.tokenizer_of(workdir / "tokenizer.model", train)
    return tokenizer, runs.prepared(workdir / "data", tokenizer, _ROW, packing="document", items=[*stated, *asked])


def measure(model, tokenizer, asked: Sequence[Fact]) -> dict[str, float]:
    """The share of right answers by direction and phrasing: which name the piece, or the composer, in its place."""
    found = {}
    for direction in QUESTIONS:
        for name, phrasing in PHRASINGS.items():
            pairs = [question(fact, direction, phrasing) for fact in asked]
            prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text, _ in pairs]
            answers = [named(text, direction) for text in runs.replies(model, tokenizer, prompts, _ROOM)]
            found[f"{direction}, {name}"] = runs.share(answers, [named(answer, direction) for _, answer in pairs])
    return found


def in_the_statement(model, tokenizer, asked: Sequence[Fact], composers: Sequence[str]) -> dict[str, float]:
    """The share of composers that are found in the first statement: `filled in` (LLaDA), and `ranked` first of all."""
    rows, hole = statements(tokenizer, asked, composers)
    right = np.asarray([composers.index(p) for p, _ in asked])
    if model.config.causal:
        whole = rows.reshape(-1, rows.shape[-1])
        scores = np.concatenate(
            [runs.next_token_log_p(model, part).sum(axis=1) for part in np.split(whole, len(asked))]
        )
        return {"ranked": float(np.mean(scores.reshape(len(asked), -1).argmax(axis=1) == right))}
    names = rows[0, :, hole]
    masked = rows[:, 0].copy()
    masked[:, hole] = tokenizer.mask_id
    filled = np.asarray(infill(model, masked).tokens)[:, hole]
    ranked = np.asarray(model(masked))[:, hole][:, names].argmax(axis=1)
    return {"filled in": float(np.mean(filled == names[right])), "ranked": float(np.mean(ranked == right))}


def statements(tokenizer, asked: Sequence[Fact], composers: Sequence[str]) -> tuple[np.ndarray, int]:
    """(rows int32 [facts, composers, L], the column of the composer): the first statement, said of every composer."""
    encode = lambda p, w: [tokenizer.bos_id, *tokenizer.encode(STATEMENTS[0].format(p=p, w=w)), tokenizer.eos_id]
    rows = np.asarray([[encode(p, w) for p in composers] for _, w in asked], np.int32)
    (hole,) = np.flatnonzero((rows != rows[:, :1]).any(axis=(0, 1)))
    return rows, int(hole)


def reversal(workdir: Path, seeds: int, steps: int, count: int = 120) -> str:
    known = facts(count)
    taught, unasked = known[: count * 5 // 6], known[count * 5 // 6 :]
    tokenizer, data = write_data(workdir, known, taught)

    def cell(kind: str, seed: int) -> dict[str, Any]:
        config = runs.config_of(kind, _SHAPE, data, row_length=_ROW, steps=steps, batch_size=_BATCH, seed=seed)
        model = runs.trained(config, workdir / f"{kind}-{seed}-{steps}")
        ask = lambda of: measure(model, tokenizer, of) | in_the_statement(model, tokenizer, of, [p for p, _ in known])
        return {"unasked": ask(unasked), "asked": ask(taught)}

    return conclude(workdir, runs.of_both(workdir, seeds, {"facts": count, "steps": steps}, cell), len(unasked))


def conclude(workdir: Path, lines: Sequence[dict[str, Any]], count: int) -> str:
    names = [name for name in lines[0]["unasked"] if name != "filled in"]
    unasked, asked = (runs.values(lines, which, names) for which in ("unasked", "asked"))
    filled = {name: np.asarray([x[name]["filled in"] for x in lines if x["kind"] == "llada"]) for name in FACTS}
    rows = []
    for which, found in (("unasked", unasked), ("asked", asked)):
        for kind, name in runs.KINDS.items():
            hole = show.spread(filled[which]) if kind == "llada" else "–"
            rows.append((FACTS[which], name, *map(show.spread, found[kind].T), hole))
    drawn, axes = show.figure()
    for i, (kind, name) in enumerate(runs.KINDS.items()):
        place = np.arange(len(names)) + 0.38 * (i - 0.5)
        axes.bar(place, unasked[kind].mean(axis=0), 0.36, color=show.COLORS[kind], label=name)
        for run in unasked[kind]:
            axes.plot(place, run, ".", color="black", markersize=4)
    axes.set(xticks=np.arange(len(names)), yticks=np.linspace(0, 1, 6), ylim=(0, 1.2))
    axes.set_ylabel(f"right, {count} facts never asked")
    axes.set_xticklabels([name.replace(", ", "\n") + " phrasing" * (", " in name) for name in names])
    axes.legend(frameon=False, ncols=2, loc="upper right")
    show.save(drawn, workdir / "reversal.svg")
    llada, arm = (dict(zip(names, unasked[kind].mean(axis=0), strict=True)) for kind in runs.KINDS)
    said = (
        f"Facts that were never asked, new phrasing: LLaDA {llada['forward, new']:.0%} forward and "
        f"{llada['backward, new']:.0%} backward, the control {arm['forward, new']:.0%} and {arm['backward, new']:.0%}. "
        f"LLaDA fills {filled['unasked'].mean():.0%} of their composers into the statement."
    )
    head = ("facts", "model", *names, "filled in")
    (workdir / "reversal.md").write_text(f"{show.table(head, rows)}\n\n{said}\n", encoding="utf-8")
    return said


def main(_argv: list[str]) -> None:
    print(reversal(runs.opened(flags.FLAGS.workdir), flags.FLAGS.seeds, flags.FLAGS.steps))


if __name__ == "__main__":
    runs.define_flags()
    flags.DEFINE_integer("steps", 3000, "Of training.", lower_bound=1)
    cli.run(main)
