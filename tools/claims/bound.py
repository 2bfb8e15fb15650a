r"""The bound: every mask against Monte Carlo, and how the noise of three ways to draw masks falls with their number.

python tools/claims/bound.py --workdir=DIR

A small LLaDA is trained on couplets for each seed. For couplets of 12 tokens all 2^12 - 1 masks are scored once: their
weighted sum is the bound, and what any draw of masks would give is looked up, not computed again. Drawn are

counts: how many tokens are masked is uniform, then which ones (`log_likelihood`; Eq. 6 of arXiv 2502.09992).
ratios: a ratio t ~ U(0.001, 1), then each token with probability t, weight 1 / t: what training does (Eq. 3).

and of each kind independent ones, or stratified: spread evenly over mini-batches of 16.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llada_jax import cli
from llada_jax.data import sources
from llada_jax.data.tokenizer import Tokenizer
from llada_jax.data.train_tokenizer import train_tokenizer
from llada_jax.evaluation import draws
from llada_jax.evaluation.likelihood import any_order_log_likelihood, log_likelihood_from_masks
from llada_jax.tools.claims import runs, show

WAYS = {
    "counts, stratified": ("#1f6fb4", "-"), "counts, independent": ("#1f6fb4", "--"),
    "ratios, stratified": ("#d1662a", "-"), "ratios, independent": ("#d1662a", "--"),
}  # fmt: skip
COUNTS = (16, 32, 64, 128, 256)  # draws of an estimate
_ROWS, _EPS, _ESTIMATES = 16, 1e-3, 2000
_SHAPE, _BATCH, _ROW, _TEXTS = runs.Shape(32, 2), 32, 14, 8


def texts() -> list[str]:
    """The embedded couplets of 12 characters; the first are scored, all are trained on."""
    return [sources.couplet_text(a, b) for a, b, _ in sources.couplets() if len(a) == len(b) == 5]


def every_sum(model, tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, float]:
    """(sum of the cross-entropies of mask n, float64 [2^A], the exact bound), nats."""
    ids = tokenizer.encode(text)
    masks = draws.bits(len(ids))[1:]
    scores = log_likelihood_from_masks(model, [tokenizer.bos_id], ids, masks, np.ones(len(masks)))
    return np.concatenate([[0.0], -scores]), any_order_log_likelihood(model, [tokenizer.bos_id], ids)[0]


def estimates(way: str, sums: np.ndarray, count: int, repeats: int, random: np.random.Generator) -> np.ndarray:
    """So many independent estimates of the bound from `count` draws each, float64 [repeats], nats."""
    length, n = int(np.log2(len(sums))), count * repeats
    rows = _ROWS if way.endswith("stratified") else 1
    if way.startswith("counts"):
        masked_NA, ratio_N = draws.fixed_count_masks(random, n // rows, rows, length)
    else:
        first_B1, offset_R = random.random((n // rows, 1)), np.arange(rows) / rows
        ratio_N = _EPS + (1 - _EPS) * ((first_B1 + offset_R) % 1.0).reshape(-1)  # as objectives/noise.py
        masked_NA = random.random((n, length)) < ratio_N[:, None]
    value_N = -sums[masked_NA @ (1 << np.arange(length))] / ratio_N
    return value_N.reshape(repeats, count).mean(axis=1)


def measure(model, tokenizer: Tokenizer, asked: Sequence[str], seed: int, repeats: int) -> dict[str, Any]:
    """errors: {way: root mean square error at each count, nats}, means over texts. bias: the largest distance of a mean
    from the exact bound, in its standard errors. exact: the bound a token, nats."""
    found = [every_sum(model, tokenizer, text) for text in asked]
    random = np.random.default_rng(seed)
    errors, bias = {}, 0.0
    for way in WAYS:
        errors[way] = []
        for count in COUNTS:
            off = [estimates(way, sums, count, repeats, random) - exact for sums, exact in found]
            errors[way].append(float(np.mean([np.sqrt(np.mean(x**2)) for x in off])))
            if way.startswith("counts"):  # ratios have a heavy tail, which makes their own standard error worthless
                bias = max(bias, *(abs(x.mean()) / (x.std() / repeats**0.5) for x in off))
    length = len(tokenizer.encode(asked[0]))
    return {"errors": errors, "bias": float(bias), "exact": float(np.mean([exact for _, exact in found])) / length}


def bound(workdir: Path, seeds: int, steps: int, repeats: int = _ESTIMATES) -> str:
    known = texts()
    tokenizer = runs.tokenizer_of(workdir / "tokenizer.model", lambda path: train_tokenizer(known, path, 8192, "char"))
    data = runs.prepared(workdir / "data", tokenizer, _ROW, items=known, packing="document")

    def cell(seed: int) -> dict[str, Any]:
        config = runs.config_of("llada", _SHAPE, data, row_length=_ROW, steps=steps, batch_size=_BATCH, seed=seed)
        model = runs.trained(config, workdir / f"llada-{seed}-{steps}")
        return measure(model, tokenizer, known[:_TEXTS], seed, repeats)

    key = {"steps": steps, "repeats": repeats}
    lines = [runs.once(workdir / "results.jsonl", {"seed": s, **key}, lambda s=s: cell(s)) for s in range(seeds)]
    return conclude(workdir, lines)


def conclude(workdir: Path, lines: Sequence[dict[str, Any]]) -> str:
    mean = {way: np.mean([line["errors"][way] for line in lines], axis=0) for way in WAYS}
    rows = [(n, *(f"{mean[way][i]:.3f}" for way in WAYS)) for i, n in enumerate(COUNTS)]
    drawn, axes = show.figure()
    for way, (color, line) in WAYS.items():
        axes.plot(COUNTS, mean[way], f"o{line}", color=color, markersize=4, label=way)
    axes.set(xscale="log", yscale="log", xlabel="draws n", ylabel="error of the bound, nats")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.set_yticks((1, 2, 5, 10), ["1", "2", "5", "10"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    show.save(drawn, workdir / "bound.svg")
    at = {way: errors[COUNTS.index(128)] for way, errors in mean.items()}
    more = {way: (error / at["counts, stratified"]) ** 2 for way, error in at.items()}
    said = (
        f"At 128 draws the bound of a couplet is known to {at['counts, stratified']:.2f} nats with stratified counts. "
        f"The variance is {more['counts, independent']:.2f} times that with independent counts, "
        f"{more['ratios, stratified']:.1f} times with stratified ratios and {more['ratios, independent']:.1f} times "
        "with independent ones. No mean over counts was more than "
        f"{max(line['bias'] for line in lines):.2f} standard errors off the exact bound."
    )
    (workdir / "bound.md").write_text(f"{show.table(('draws', *WAYS), rows)}\n\n{said}\n", encoding="utf-8")
    return said


def main(_argv: list[str]) -> None:
    print(bound(runs.opened(flags.FLAGS.workdir), flags.FLAGS.seeds, flags.FLAGS.steps))


if __name__ == "__main__":
    runs.define_flags()
    flags.DEFINE_integer("steps", 600, "Of training.", lower_bound=1)
    cli.run(main)
