"""Bounds of the choices of many questions; a question may stop early, when the order of its choices is decided.

N draws, U different masks, A answer length.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llada_jax.evaluation import draws, rows

_FIRST_LOOK = 16  # draws; each further look doubles them


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """One answer to a question. Choices of one question have equal `question`, from which their masks are drawn."""

    pair: rows.Pair
    question: bytes
    scales: tuple[float, ...] = (1.0,)  # what a metric divides its bound by, such as its number of characters


@dataclasses.dataclass
class _Asked:
    """A choice on its way: sums of the cross-entropies of those masks that are scored."""

    plan: draws.Plan
    sums_U: np.ndarray  # float64, NaN where not yet
    used: int = 0  # draws

    def values(self) -> np.ndarray:
        """The estimate of each draw that is used, float64 [N]; of an exact plan the bound alone, [1]."""
        if self.plan.is_exact:
            return np.asarray([-self.plan.weights @ self.sums_U])
        weights_N = self.plan.weights[: self.used] * len(self.plan.weights)
        return -weights_N * self.sums_U[self.plan.mask_of[: self.used]]


def bounds(
    model,
    choices: Sequence[Choice],
    key: jax.Array,
    *,
    mc_num: int,
    mini_batch: int,
    cfg_scale: float = 0.0,
    stop_at: float | None = None,
    rows_at_once: int | None = None,
) -> Iterator[tuple[int, float, int]]:
    """(number of a choice, its bound in nats, the draws that it took), as they come.

    mc_num draws in mini-batches of `mini_batch` make the unbiased estimate of `log_likelihood`. With stop_at, a
    confidence below 1, a question is looked at after 16, 32, 64, … draws: it stops as soon as its leader is ahead of
    every other choice with that confidence, for each of their scales. Its bounds are then noisier, and picked for their
    noise: good for accuracy, not for reported likelihoods. A question with one choice never stops early.
    """
    asked = []
    for choice in choices:
        plan = draws.plan(choice.pair.length, mc_num, mini_batch, draws.generator(key, choice.question))
        asked.append(_Asked(plan, np.full(len(plan.masks), np.nan)))
    groups: dict[bytes, list[int]] = collections.defaultdict(list)
    for i, choice in enumerate(choices):
        groups[choice.question].append(i)
    upto = mc_num if stop_at is None else min(math.lcm(_FIRST_LOOK, mini_batch), mc_num)
    z = math.inf if stop_at is None else statistics.NormalDist().inv_cdf(1 - (1 - stop_at) / 2)
    while groups:
        open_ = [
            i for members in groups.values() for i in members if stop_at is None or len(members) > 1 or upto >= mc_num
        ]
        for i in _score(model, choices, asked, open_, upto, cfg_scale, rows_at_once):
            if stop_at is None:
                yield i, *_result(asked[i])
        for question, members in list(groups.items()):
            if upto >= mc_num or _is_decided([choices[i] for i in members], [asked[i] for i in members], z):
                if stop_at is not None:
                    yield from ((i, *_result(asked[i])) for i in members)
                del groups[question]
        upto = min(2 * upto, mc_num)


def _score(model, choices, asked: list[_Asked], open_: list[int], upto: int, cfg_scale, rows_at_once) -> Iterator[int]:
    """Scores what the first `upto` draws need and is not scored; yields each choice when it is done."""
    jobs, masks_of = [], []
    for i in open_:
        a = asked[i]
        a.used = min(upto, len(a.plan.mask_of))
        needed = np.arange(len(a.sums_U)) if a.plan.is_exact else np.unique(a.plan.mask_of[: a.used])
        missing = needed[np.isnan(a.sums_U[needed])]
        if len(missing):
            jobs.append((choices[i].pair, a.plan.masks[missing]))
            masks_of.append((i, missing))
        else:
            yield i
    for job, ce_UA in rows.cross_entropies(model, jobs, cfg_scale=cfg_scale, rows_at_once=rows_at_once):
        i, missing = masks_of[job]
        asked[i].sums_U[missing] = ce_UA.sum(axis=1)
        yield i


def _result(asked: _Asked) -> tuple[float, int]:
    return float(np.mean(asked.values())), len(asked.plan.masks) if asked.plan.is_exact else asked.used


def _is_decided(choices: list[Choice], asked: list[_Asked], z: float) -> bool:
    """Whether one choice leads every other by z standard errors of their difference, for each scale."""
    if len(choices) < 2:
        return False
    values = [a.values() for a in asked]
    for scale in range(len(choices[0].scales)):
        scaled = [v / choice.scales[scale] for v, choice in zip(values, choices, strict=True)]
        leader = int(np.argmax([np.mean(v) for v in scaled]))
        for other in range(len(scaled)):
            ahead = scaled[leader] - scaled[other]  # draw by draw: the masks are common to both
            error = 0.0 if len(ahead) == 1 else np.std(ahead, ddof=1) / math.sqrt(len(ahead))
            if other != leader and not np.mean(ahead) > z * error:
                return False
    return True
