r"""Loss and a task's score against compute, for LLaDA and an autoregressive control on the same text.

python tools/scaling.py --workdir=DIR [--sizes=32x2,64x4] [--budgets=3e10,1e11] [--seeds=1] [--files='books/*.txt']

Every cell of sizes (width x layers) and budgets trains both kinds on as many tokens as the budget buys: FLOPs are 6·N·D
with N the parameters without embedding and head and D the tokens, as in the LLaDA paper (arXiv 2502.09992, section 3.2)
and in arXiv 2001.08361. What is measured, on rows that no model was trained on:

loss: nats a token given the row's first token: exact for the control, the bound of Eq. 6 for LLaDA.
score: of four endings of a row, 16 tokens each, how often the true one is the likeliest. Chance is 25%.

A finished cell is a line of results.jsonl; the same command goes on after a kill, and one with other sizes, budgets or
seeds adds to what is there. At each budget the best size counts;
a power law is fitted to these. The ratio of both kinds' compute at the lowest loss that both reach is compared with the
published one, about 16 (arXiv 2410.18514).
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.config import RunConfig
from llada_jax.data import dataset, sources
from llada_jax.data.tokenizer import load_tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.evaluation.likelihood import log_likelihood
from llada_jax.fields import InputError
from llada_jax.model.config import model_config
from llada_jax.model.transformer import parameter_count
from llada_jax.tools.claims import laws, runs, show
from llada_jax.tools.claims.laws import Law, Line

ROW = 64  # tokens
_BATCH, _VOCABULARY = 8, 512
_HELD_OUT, _ENDING, _CHOICES = 96, 16, 4


def measure(model, rows_BL: np.ndarray) -> Line:
    """Loss and score on held-out rows of ROW tokens."""
    random = np.random.default_rng(0)
    asked, endings = [], []  # the first ending of each question is the right one
    for i, row in enumerate(rows_BL):
        others = random.choice(np.delete(np.arange(len(rows_BL)), i), _CHOICES - 1, replace=False)
        asked += [row[:-_ENDING]] * _CHOICES
        endings += [rows_BL[j, -_ENDING:] for j in (i, *others)]
    if model.config.causal:
        loss = -float(np.mean(runs.next_token_log_p(model, rows_BL)))
        whole = np.concatenate([np.stack(asked), np.stack(endings)], axis=1)
        log_p = np.asarray(runs.next_token_log_p(model, whole))[:, -_ENDING:].sum(axis=1)
    else:
        firsts, rests = list(rows_BL[:, :1]), list(rows_BL[:, 1:])
        bounds = log_likelihood(model, firsts, rests, mc_num=16, batch_size=16, key=jax.random.key(0))
        loss = -float(np.mean(bounds)) / (ROW - 1)
        log_p = log_likelihood(model, asked, endings, mc_num=4, batch_size=4, key=jax.random.key(1))
    log_p = log_p.reshape(-1, _CHOICES)
    return {"loss": loss, "score": float(np.mean(log_p[:, 0] > log_p[:, 1:].max(axis=1)))}


def cell(workdir: Path, kind: str, size: runs.Shape, budget: float, seed: int) -> Line:
    """Trains and measures one model."""
    config = runs.config_of(kind, size, workdir / "data", row_length=ROW, steps=1, batch_size=_BATCH, seed=seed)
    config.model.rope_theta = 500_000.0  # the recipe's
    vocabulary = load_tokenizer(workdir / "tokenizer.model").vocab_size
    body = body_parameters(config, vocabulary)
    steps = max(round(budget / (6 * body * ROW * _BATCH)), 1)
    runs.set_steps(config, steps)
    place = workdir / f"{kind}-{size}-{budget:g}-{seed}"
    found = measure(runs.trained(config, place), held_out(workdir))
    runs.forget(place)
    return {"parameters": body, "steps": steps, "tokens": steps * ROW * _BATCH, **found}


def body_parameters(config: RunConfig, vocabulary: int) -> int:
    """The parameters of a model without embedding and head."""
    c = model_config({**config.model, "vocab_size": vocabulary, "embedding_size": vocabulary})
    return parameter_count(c) - 2 * vocabulary * c.d_model


def prepare(workdir: Path, files: str) -> None:
    """Tokenizer and rows; a share of the documents is held out."""
    train = lambda path: train_tokenizer(_documents(files), path, _VOCABULARY)
    tokenizer = runs.tokenizer_of(workdir / "tokenizer.model", train)
    runs.prepared(workdir / "data", tokenizer, ROW, files=files, validation_fraction=0.03)


def _documents(files: str) -> Iterator[str]:
    return (text for file in sources.expand_files(files) for text in sources.read_documents(file))


def held_out(workdir: Path) -> np.ndarray:
    """The rows that are measured, int32 [B, ROW]: whole ones, always the same."""
    source = dataset.open_dataset(workdir / "data" / "validation")
    order = np.random.default_rng(0).permutation(len(source))
    rows = (source[int(i)] for i in order)
    whole = itertools.islice((row["tokens"] for row in rows if row["length"] == ROW), _HELD_OUT)
    return np.stack([np.asarray(tokens, np.int32) for tokens in whole])


def conclude(workdir: Path, lines: Sequence[Line]) -> str:
    """Writes scaling.md and scaling.svg; returns the line that says what came out."""
    best = {kind: laws.frontier(lines, kind) for kind in runs.KINDS}
    ratio, loss = laws.ratio_at_equal_loss(best["llada"], best["arm"])
    fitted = {kind: laws.fit([x["budget"] for x in best[kind]], [x["loss"] for x in best[kind]]) for kind in runs.KINDS}
    said = (
        f"LLaDA comes to {loss:.2f} nats a token with {ratio:.1f} times the compute of the control; by the fitted laws "
        f"it would be {fitted['llada'].flops(loss) / fitted['arm'].flops(loss):.1f} times. Published: about 16."
    )
    rows = [
        (f"{x['budget']:.0e}", name, x["size"], f"{x['tokens']:,.0f}", f"{x['loss']:.3f}", f"{x['score']:.1%}")
        for kind, name in runs.KINDS.items() for x in best[kind]
    ]  # fmt: skip
    head = ("FLOPs", "model", "best size", "tokens", "nats a token", "score")
    fits = "\n".join(f"{runs.KINDS[k]}: loss = {law.scale:.3g} · FLOPs^-{law.power:.4f}" for k, law in fitted.items())
    (workdir / "scaling.md").write_text(f"{show.table(head, rows)}\n\n{fits}\n\n{said}\n", encoding="utf-8")
    draw(workdir / "scaling.svg", lines, best, fitted)
    return said


def draw(path: Path, lines: Sequence[Line], best: dict[str, list[Line]], fitted: dict[str, Law]) -> None:
    drawn, (left, right) = show.figure(8.4, 3.6, columns=2)
    for kind, name in runs.KINDS.items():
        color, own = show.COLORS[kind], [line for line in lines if line["kind"] == kind]
        for axes, what in ((left, "loss"), (right, "score")):
            axes.scatter([x["budget"] for x in own], [x[what] for x in own], s=8, color=color, alpha=0.35, linewidth=0)
        budgets = np.asarray([x["budget"] for x in best[kind]])
        left.plot(
            budgets,
            fitted[kind].loss(budgets),
            color=color,
            linewidth=1,
            label=f"{name}: FLOPs^-{fitted[kind].power:.3f}",
        )
        left.plot(budgets, [x["loss"] for x in best[kind]], "o", color=color, markersize=4)
        right.plot(budgets, [x["score"] for x in best[kind]], "o-", color=color, markersize=4, label=name)
    right.axhline(1 / _CHOICES, color="gray", linewidth=0.8, linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="training FLOPs (6ND)", ylabel="held-out loss, nats a token")
    right.set(xscale="log", xlabel="training FLOPs (6ND)", ylabel="true ending found")
    show.plain_ticks(left.yaxis)
    for axes in (left, right):
        axes.legend(frameon=False)
    show.save(drawn, path)


def read_sizes(text: str) -> list[runs.Shape]:
    """`32x2,64x4` as shapes. Raises InputError."""
    try:
        return [runs.Shape(*map(int, size.split("x"))) for size in text.split(",")]
    except (ValueError, TypeError) as error:
        raise InputError(f"--sizes={text}: must be width x layers, as in 32x2,64x4") from error


def read_budgets(text: str) -> list[float]:
    """`1e10,3e10` as FLOPs. Raises InputError."""
    try:
        budgets = [float(budget) for budget in text.split(",")]
    except ValueError as error:
        raise InputError(f"--budgets={text}: must be FLOPs, as in 1e10,3e10") from error
    if len(set(budgets)) < 2 or not all(0 < budget < 1e18 for budget in budgets):
        raise InputError(f"--budgets={text}: a law needs two budgets or more, from 0 to 1e18")
    return sorted(budgets)


def scale(workdir: Path, sizes: Sequence[runs.Shape], budgets: Sequence[float], seeds: int, files: str) -> str:
    """Runs what is missing of the grid, the cheapest cells of a seed first, and concludes from all that is finished."""
    prepare(workdir, files)
    grid = itertools.product(range(seeds), sorted(budgets), sizes, runs.KINDS)
    path = workdir / "results.jsonl"
    for seed, budget, size, kind in grid:
        key = {"kind": kind, "size": str(size), "budget": budget, "seed": seed}
        runs.once(path, key, functools.partial(cell, workdir, kind, size, budget, seed))
    return conclude(workdir, runs.finished(path))


def main(_argv: list[str]) -> None:
    f = flags.FLAGS
    sizes, budgets = read_sizes(f.sizes), read_budgets(f.budgets)
    print(scale(runs.opened(f.workdir), sizes, budgets, f.seeds, f.files))


if __name__ == "__main__":
    runs.define_flags()
    flags.DEFINE_string("sizes", "24x2,32x3,48x3,64x4", "Width x layers of the models.")
    flags.DEFINE_string("budgets", "1e10,3e10,1e11,3e11", "Training FLOPs of a model.")
    flags.DEFINE_string("files", "python_reference", "The corpus: globs, or an embedded one.")
    cli.run(main)
