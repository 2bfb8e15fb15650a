"""Which masks of an answer are scored, and what each counts for the bound.

N draws, U different masks among them, A answer length, B mini-batches, R rows of one.

The bound is -E[A / |M| · CE_M] with |M| uniform in 1..A and M uniform among the sets of its size (Eq. 6 of arXiv
2502.09992). All draws are a pure function of a key and of the question that is asked, made by NumPy: no program is
compiled for them, and neither batches nor devices change them. Answers of one question share them as far as their
lengths allow (common random numbers), so that what is noise in both cancels in their difference.
"""

import dataclasses
import hashlib
import math

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The bound is -Σ over draws of weight · Σ CE over mask `mask_of[n]`.

    Equal masks are scored once, which changes no estimate: of 128 draws of a short answer many are equal.
    """

    masks: np.ndarray  # bool [U, A]
    mask_of: np.ndarray  # int [N]
    weights: np.ndarray  # float64 [N]
    is_exact: bool

    def bound(self, ce_UA: np.ndarray) -> float:
        """Nats, from the cross-entropies of the masked tokens of each mask."""
        return float(-self.weights @ ce_UA.sum(axis=1)[self.mask_of])


def plan(length: int, mc_num: int, rows: int, random: np.random.Generator) -> Plan:
    """All masks where these are at most mc_num, else mc_num // rows mini-batches of drawn ones."""
    if length < 31 and 2**length - 1 <= mc_num:
        return every_mask(length)
    masked_NA, ratio_N = fixed_count_masks(random, mc_num // rows, rows, length)
    _, first, mask_of = np.unique(np.packbits(masked_NA, axis=1), axis=0, return_index=True, return_inverse=True)
    return Plan(masked_NA[first], mask_of.reshape(-1), 1 / (ratio_N * len(ratio_N)), is_exact=False)


def every_mask(length: int) -> Plan:
    """The exact bound: each of the C(A, l) masks of l tokens weighs 1 / (A · C(A, l)) · A / l."""
    masked_NA = bits(length)[1:]  # the first masks nothing
    count_N = masked_NA.sum(axis=1)
    weights = np.asarray([1 / (n * math.comb(length, n)) for n in range(1, length + 1)])[count_N - 1]
    return Plan(masked_NA, np.arange(len(masked_NA)), weights, is_exact=True)


def generator(key: jax.Array, question: bytes) -> np.random.Generator:
    """The random numbers of a question."""
    seed = hashlib.sha256(np.asarray(jax.random.key_data(key)).tobytes() + question).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed[:16], "little")))


def fixed_count_masks(
    random: np.random.Generator, batches: int, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool [batches · rows, length] with numbers of masked tokens spread over each mini-batch, and their ratios.

    With k ~ U{1..A}, row j of R masks x_j = (k + round(j·A/R) - 1) mod A + 1 tokens: the x_j of the official code, save
    that halves are rounded up. There they are rounded to even after adding k, so that a row with a half meets only
    every other number, some of them twice, and its estimate is biased. A shorter answer gets from the same generator
    the same k / A and the same order of the positions that it has.
    """
    k_B = 1 + (random.random(batches) * length).astype(int)
    count_N = stratified_counts(k_B, rows, length).reshape(-1)
    draws_NA = random.random((length, batches * rows)).T  # position after position
    rank_NA = np.argsort(np.argsort(draws_NA, axis=1, kind="stable"), axis=1)
    return rank_NA < count_N[:, None], count_N / length


def stratified_counts(k_B: np.ndarray, rows: int, length: int) -> np.ndarray:
    """How many tokens each row of each mini-batch masks, int [batches, rows], for k drawn from 1..length."""
    offset_R = (2 * np.arange(rows) * length + rows) // (2 * rows)
    return (np.asarray(k_B)[:, None] + offset_R - 1) % length + 1


def bits(length: int) -> np.ndarray:
    """Every mask, bool [2^A, A]: mask n masks the bits of n."""
    return (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1
