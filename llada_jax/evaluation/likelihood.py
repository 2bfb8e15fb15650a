"""How likely a model finds an answer to a prompt, or a text: LLaDA's Monte Carlo bound, exact for short answers.

N masks, A answer length, P prompt length, S = P + A.

For a masked set M of the answer, CE_M is the sum of -log p(x_i | prompt, what is not masked) over M. The bound is
-E[A / |M| · CE_M] with |M| uniform in 1..A and M uniform among the sets of its size (Eq. 6 of arXiv 2502.09992). It is
also what the training objective integrates to over t, and the mean over all orders of the log-likelihood by the chain
rule in that order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from llada_jax import inputs
from llada_jax.evaluation import draws, rows
from llada_jax.fields import InputError

_MOST_ENUMERATED = 16  # tokens of an answer whose 2^A masks are enumerated


def log_likelihood(
    model, prompt, answer, *, mc_num: int = 128, batch_size: int = 16, cfg_scale: float = 0.0,
    key: jax.Array | None = None,
) -> Any:  # fmt: skip
    """Monte Carlo lower bound of log p(answer | prompt), nats; unbiased for the bound (Eq. 6 of arXiv 2502.09992).

    prompt, answer: token ids, int [P] and [A]; the prompt may be empty. Or lists of B prompts and B answers of any
    lengths, or one prompt and B answers to it.
    mc_num // batch_size mini-batches are drawn, in each of which the numbers of masked tokens are spread evenly over
    1..A; a remainder of mc_num is dropped, as in the official code. An answer with at most mc_num masks (7 tokens at
    128) is scored with all of them: the result is the bound itself, without noise.
    cfg_scale: classifier-free guidance, Eq. 16. key: of the draws, jax.random.key(0) by default; a result depends on
    key, prompt and answer alone, and answers to one prompt share their draws.

    Returns a float, or float64 [B]. Raises InputError for what does not fit the model, and for scores that are not
    finite.
    """
    pairs, is_one = read_pairs(model.config, prompt, answer)
    plans = plan_all(pairs, [pair.question for pair in pairs], mc_num, batch_size, key)
    bounds = np.zeros(len(pairs))
    jobs = [(pair, plan.masks) for pair, plan in zip(pairs, plans, strict=True)]
    for i, ce_UA in rows.cross_entropies(model, jobs, cfg_scale=cfg_scale):
        bounds[i] = plans[i].bound(ce_UA)
    return float(bounds[0]) if is_one else bounds


def confidence_score(model, prompt, answer, *, cfg_scale: float = 0.0) -> Any:
    """The score of iLLaDA (arXiv 2606.25331) for multiple choice, nats: no bound, and without chance.

    The answer starts masked. Each of its A steps reveals the true token of which the model is surest and adds its
    log-probability. Arguments and result as those of `log_likelihood`. Raises InputError for what does not fit.
    """
    pairs, is_one = read_pairs(model.config, prompt, answer)
    scores = np.zeros(len(pairs))
    for i, _, log_p_A in rows.confidence_orders(model, pairs, cfg_scale=cfg_scale):
        scores[i] = log_p_A.sum()
    return float(scores[0]) if is_one else scores


def rolling_log_likelihood(
    model, tokens, *, max_length: int | None = None, context_length: int = 1, prefix: int | None = None,
    mc_num: int = 128, batch_size: int = 16, cfg_scale: float = 0.0, key: jax.Array | None = None,
) -> Any:  # fmt: skip
    """Lower bound of log p of a text of any length, nats: the sum of `log_likelihood` over windows that follow another.

    tokens: token ids, int [L], or a list of B texts, each on its own.
    max_length: of a window with what it is given, at most and by default the model's context. context_length: tokens
    before a window that it is given at least; more make the bound tighter and cost more windows. prefix: the token that
    the first window is given, such as BOS; None: nothing. The other arguments are those of `log_likelihood`.

    Returns a float, or float64 [B]. Raises InputError for numbers that make no windows.
    """
    is_one = not _is_nested(tokens)
    texts = [
        inputs.token_ids("text", x, model.config.embedding_size, "[tokens]") for x in ([tokens] if is_one else tokens)
    ]
    found = np.zeros(len(texts))
    for i, bound in rolling_bounds(
        model, [text.tolist() for text in texts], max_length=max_length, context_length=context_length, prefix=prefix,
        mc_num=mc_num, batch_size=batch_size, cfg_scale=cfg_scale, key=key,
    ):  # fmt: skip
        found[i] = bound
    return float(found[0]) if is_one else found


def rolling_bounds(
    model, texts: Sequence[list[int]], *, max_length: int | None, context_length: int, prefix: int | None, mc_num: int,
    batch_size: int, cfg_scale: float, key: jax.Array | None, rows_at_once: int | None = None,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """(number of a text, its `rolling_log_likelihood`), as they come; 0 for a text without tokens."""
    c = model.config
    max_length = c.max_sequence_length if max_length is None else inputs.whole("max_length", max_length)
    if not 2 <= max_length <= c.max_sequence_length:
        raise InputError(f"max_length {max_length} must be from 2 to the model's context, {c.max_sequence_length}")
    if not 1 <= inputs.whole("context_length", context_length) < max_length:
        raise InputError(f"context_length {context_length} must be from 1 to {max_length - 1}, below max_length")
    pairs, places, left = [], [], [0] * len(texts)
    for i, text in enumerate(texts):
        if not text:
            yield i, 0.0
            continue
        for given, scored in windows(text, max_length, context_length, prefix):
            pairs.append(rows.make_pair(c, given, scored))
            places.append((i, left[i]))
            left[i] += 1
    asked = [place.to_bytes(4, "little") + np.asarray(texts[i], np.int32).tobytes() for i, place in places]
    plans = plan_all(pairs, asked, mc_num, batch_size, key)
    jobs = [(pair, plan.masks) for pair, plan in zip(pairs, plans, strict=True)]
    sums = np.zeros(len(texts))
    for job, ce_UA in rows.cross_entropies(model, jobs, cfg_scale=cfg_scale, rows_at_once=rows_at_once):
        i = places[job][0]
        sums[i] += plans[job].bound(ce_UA)
        left[i] -= 1
        if not left[i]:
            yield i, float(sums[i])


def windows(
    tokens: list[int], max_length: int, context_length: int, prefix: int | None
) -> list[tuple[list[int], list[int]]]:
    """(given, scored) of each window: every token is scored once, and both have at most max_length tokens.

    The windows of lm-evaluation-harness for max_seq_len = max_length - 1, since here the canvas holds both.
    """
    done = min(len(tokens), max_length - 1)
    found = [([] if prefix is None else [prefix], tokens[:done])]
    while done < len(tokens):
        end = min(done + max_length - context_length, len(tokens))
        found.append((tokens[max(end - max_length, 0) : done], tokens[done:end]))
        done = end
    return found


def log_likelihood_from_masks(model, prompt, answer, masked, mask_ratio, cfg_scale: float = 0.0) -> np.ndarray:
    """-Σ over masked of CE / mask_ratio for each mask, float64 [N], nats.

    masked: bool [N, A], or [N, P + A] with nothing of the prompt masked. mask_ratio: float [N] or of masked's shape, in
    (0, 1] where something is masked. Raises InputError for what does not fit.
    """
    pair = rows.make_pair(model.config, prompt, answer)
    masked = inputs.zeros_and_ones("masked", masked)
    ratio = np.asarray(inputs.array("mask_ratio", mask_ratio, "iuf"), np.float64)
    A, S = pair.length, len(pair.tokens)
    shapes = [(len(masked), A), (len(masked), S)] if masked.ndim == 2 else []
    if masked.shape not in shapes or len(masked) == 0:
        raise InputError(f"masked has shape {masked.shape}; it must be [masks, {A}] or [masks, {S}]")
    if ratio.ndim not in (1, 2) or ratio.shape not in (*shapes, masked.shape[:1]):
        raise InputError(f"mask_ratio has shape {ratio.shape}; it must be {masked.shape[:1]} or {masked.shape}")
    ratio = ratio[:, None] if ratio.ndim == 1 else ratio[:, -A:]
    if masked.shape[1] == S:
        if masked[:, : pair.start].any():
            raise InputError("masked covers tokens of the prompt; only those of the answer may be masked")
        masked = masked[:, pair.start :]
    inputs.ratios(masked, ratio)
    return -np.sum(_one(model, pair, masked, cfg_scale) / np.where(masked, ratio, 1.0), axis=1)


def any_order_log_likelihood(model, prompt, answer, *, cfg_scale: float = 0.0) -> tuple[float, float]:
    """Over all A! orders of generation, the mean of log p(answer | prompt, order), and log of the mean of p; nats.

    The first is the exact value of what `log_likelihood` estimates and training bounds with. The second is the log-
    likelihood of the text that one gets by drawing an order and then token after token in it. By Jensen's inequality
    the first is never larger; they are equal when the order makes no difference. Costs 2^A forward passes: raises
    InputError for answers of more than 16 tokens.
    """
    pair = rows.make_pair(model.config, prompt, answer)
    A = pair.length
    if A > _MOST_ENUMERATED:
        raise InputError(f"an answer of {A} tokens has 2^{A} masks; at most {_MOST_ENUMERATED} tokens are enumerated")
    masked_NA = draws.bits(A)
    ce_NA = _one(model, pair, masked_NA, cfg_scale)
    bound, log_p = np.zeros(2**A), np.zeros(2**A)  # of what mask n leaves to be said, from nothing upwards
    for n in range(1, 2**A):
        bits = np.flatnonzero(masked_NA[n])
        rest = n ^ (1 << bits)  # after one more token, each of them equally often the next
        bound[n] = np.mean(bound[rest] - ce_NA[n, bits])
        log_p[n] = np.logaddexp.reduce(log_p[rest] - ce_NA[n, bits]) - math.log(len(bits))
    return float(bound[-1]), float(log_p[-1])


def read_pairs(c, prompt, answer) -> tuple[list[rows.Pair], bool]:
    """The pairs of a caller, and whether it is one that is not in a list."""
    if not _is_nested(answer):
        return [rows.make_pair(c, prompt, answer)], True
    prompts = prompt if _is_nested(prompt) else [prompt] * len(answer)
    if len(prompts) != len(answer):
        raise InputError(f"{len(prompts)} prompts and {len(answer)} answers; there must be as many, or one prompt")
    return [rows.make_pair(c, *pair) for pair in zip(prompts, answer, strict=True)], False


def plan_all(
    pairs: Sequence[rows.Pair], questions: Sequence[bytes], mc_num: int, batch_size: int, key: jax.Array | None
) -> list[draws.Plan]:
    """The masks of each pair, drawn for its question. Raises InputError for impossible numbers of draws."""
    mc_num, batch_size = inputs.whole("mc_num", mc_num), inputs.whole("batch_size", batch_size)
    if not 1 <= batch_size <= mc_num:
        raise InputError(f"mc_num {mc_num} and batch_size {batch_size}: need 1 <= batch_size <= mc_num")
    if mc_num % batch_size:
        text = "mc_num %d is not a multiple of batch_size %d: %d samples are dropped"
        logging.log_first_n(logging.WARNING, text, 1, mc_num, batch_size, mc_num % batch_size)
    key = inputs.random_key(key)
    return [
        draws.plan(pair.length, mc_num, batch_size, draws.generator(key, question))
        for pair, question in zip(pairs, questions, strict=True)
    ]


def _one(model, pair: rows.Pair, masked_NA: np.ndarray, cfg_scale: float) -> np.ndarray:
    """The cross-entropies of one pair, float64 [N, A]."""
    ((_, ce_NA),) = rows.cross_entropies(model, [(pair, masked_NA)], cfg_scale=cfg_scale)
    return ce_NA


def _is_nested(ids: Any) -> bool:
    """Whether it is a list of rows of token ids, not one row."""
    if isinstance(ids, np.ndarray | jax.Array):
        return ids.ndim > 1
    return isinstance(ids, list | tuple) and len(ids) > 0 and not isinstance(ids[0], str) and np.ndim(ids[0]) > 0
