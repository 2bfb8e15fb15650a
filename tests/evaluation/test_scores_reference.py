"""Bounds, confidence scores, greedy answers and windows against numbers of the official model on small checkpoints."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from reference import REFERENCE, load

import llada_jax
from llada_jax.evaluation import draws, likelihood, rows
from llada_jax.fields import InputError
from llada_jax.interop import hf
from llada_jax.parallel.mesh import make_mesh

CASES = json.loads((REFERENCE / "evaluation.json").read_text())
CHECKPOINTS = ["ckpt_a_mha", "ckpt_b_gqa_tied", "ckpt_e_train"]


def grouped(kind, checkpoint):
    """(guidance, cases) of a checkpoint: what one call can score."""
    cases = [case for case in CASES[kind] if case["ckpt"] == checkpoint]
    for scale in sorted({case.get("cfg_scale", 0.0) for case in cases}):
        yield scale, [case for case in cases if case.get("cfg_scale", 0.0) == scale]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_short_answers_have_the_exact_bound(checkpoint):
    for scale, cases in grouped("likelihood", checkpoint):
        pairs = [c["prompt"] for c in cases], [c["answer"] for c in cases]
        found = llada_jax.log_likelihood(load(checkpoint), *pairs, cfg_scale=scale)  # 2^6 - 1 masks: all of them
        np.testing.assert_allclose(found, [c["bound"] for c in cases], rtol=1e-5)
    for case in cases:  # the last, with guidance
        _, log_p = likelihood.any_order_log_likelihood(
            load(checkpoint), case["prompt"], case["answer"], cfg_scale=scale
        )
        assert log_p == pytest.approx(case["any_order"], rel=1e-5)


def test_drawn_masks_estimate_the_bound_with_the_variance_that_theory_gives():
    case = max((c for c in CASES["likelihood"] if c["cfg_scale"] == 0), key=lambda c: len(c["answer"]))
    rows_ = case["stratified_half_up"]["rows"]
    model, pair = load(case["ckpt"]), (case["prompt"], case["answer"])
    ce = np.asarray(case["cross_entropy"]).sum(axis=1)  # of every mask, its bits the masked tokens
    estimates = []
    for seed in range(2000):
        masked, ratio = draws.fixed_count_masks(np.random.default_rng(seed), 1, rows_, len(case["answer"]))
        estimates.append(-np.mean(ce[masked @ (1 << np.arange(masked.shape[1]))] / ratio))
    variance = case["stratified_half_up"]["variance_of_one_mini_batch"]
    assert abs(np.mean(estimates) - case["bound"]) < 4 * math.sqrt(variance / len(estimates))
    assert np.var(estimates) == pytest.approx(variance, rel=0.15)
    found = llada_jax.log_likelihood(model, *pair, mc_num=48, batch_size=rows_)
    assert 0 < abs(found - case["bound"]) < 5 * math.sqrt(variance / 6)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_surest_true_token_is_revealed_first(checkpoint):
    for scale, cases in grouped("confidence", checkpoint):
        model = load(checkpoint)
        pairs = [rows.make_pair(model.config, c["prompt"], c["answer"]) for c in cases]
        found = list(rows.confidence_orders(model, pairs, cfg_scale=scale))
        assert sorted(i for i, _, _ in found) == list(range(len(cases)))
        for i, step, log_p in found:
            np.testing.assert_array_equal(np.argsort(step), cases[i]["order"])
            np.testing.assert_allclose(log_p[np.argsort(step)], cases[i]["log_p"], rtol=1e-5)
        scores = llada_jax.confidence_score(
            model, [c["prompt"] for c in cases], [c["answer"] for c in cases], cfg_scale=scale
        )
        np.testing.assert_allclose(scores, [c["score"] for c in cases], rtol=1e-5)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_choices_are_picked_as_the_exact_scores_say(checkpoint):
    for scale, cases in grouped("choices", checkpoint):
        for case in cases:
            choices = case["prompt"], case["candidates"]
            bound = llada_jax.log_likelihood(load(checkpoint), *choices, cfg_scale=scale)
            confidence = llada_jax.confidence_score(load(checkpoint), *choices, cfg_scale=scale)
            np.testing.assert_allclose(bound, case["bound"], rtol=1e-5)
            np.testing.assert_allclose(confidence, case["confidence"], rtol=1e-5)
            per_token = bound / [len(choice) for choice in case["candidates"]]
            picked = [int(np.argmax(x)) for x in (bound, confidence, per_token)]
            assert picked == [case["best_by_bound"], case["best_by_confidence"], case["best_by_bound_per_token"]]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_texts_of_any_length_are_scored_in_windows(checkpoint):
    for case in (c for c in CASES["rolling"] if c["ckpt"] == checkpoint):
        place = dict(max_length=case["max_length"], context_length=case["context_length"], prefix=case["prefix"])
        found = likelihood.windows(case["tokens"], *place.values())
        assert found == [(w["given"], w["scored"]) for w in case["windows"]]
        bound = llada_jax.rolling_log_likelihood(load(checkpoint), case["tokens"], **place)
        assert bound == pytest.approx(case["bound"], rel=1e-5)


MIXED = [([9, 20, 31], [40, 7, 12, 55, 7, 33, 18, 61]), ([], [4, 8, 15]), ([5] * 20, [16] * 12), ([9, 20, 31], [40, 7])]


@functools.cache
def alone(scale):
    return [llada_jax.log_likelihood(load("ckpt_e_train"), *p, mc_num=32, batch_size=8, cfg_scale=scale) for p in MIXED]


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("rows_at_once", [1, 8, None])
def test_a_score_does_not_depend_on_its_batch(rows_at_once, scale):
    model = load("ckpt_e_train")
    pairs, _ = likelihood.read_pairs(model.config, *zip(*MIXED, strict=True))
    plans = likelihood.plan_all(pairs, [pair.question for pair in pairs], 32, 8, None)
    jobs = [(pair, plan.masks) for pair, plan in zip(pairs, plans, strict=True)]
    found = dict(rows.cross_entropies(model, jobs, cfg_scale=scale, rows_at_once=rows_at_once))
    np.testing.assert_allclose([plans[i].bound(found[i]) for i in range(len(jobs))], alone(scale), rtol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 2, 2, 2)])
def test_a_score_does_not_depend_on_the_mesh(sizes):
    prompts, answers = zip(*MIXED, strict=True)
    model = load("ckpt_e_train")
    confidence, wanted = llada_jax.confidence_score(model, prompts, answers), alone(0.5)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True)))
    with jax.set_mesh(mesh):
        split = hf.load(REFERENCE / "ckpt_e_train", mesh=mesh)
        found = llada_jax.log_likelihood(split, prompts, answers, mc_num=32, batch_size=8, cfg_scale=0.5)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        np.testing.assert_allclose(llada_jax.confidence_score(split, prompts, answers), confidence, rtol=1e-5)


def test_answers_to_one_question_share_their_draws():
    """What both lengths have is masked in the same order; another question or key draws anew."""
    masks = lambda length, key=0, question=b"q": draws.fixed_count_masks(
        draws.generator(jax.random.key(key), question), 4, 8, length
    )[0]
    np.testing.assert_array_equal(masks(12), masks(12))
    assert (masks(12) != masks(12, key=1)).any() and (masks(12) != masks(12, question=b"other")).any()
    short, long = masks(9), masks(12)
    order = lambda masked: [set(np.flatnonzero(row[:9])) for row in masked]
    assert all(a <= b or b <= a for a, b in zip(order(short), order(long), strict=True))  # parts of one order


@pytest.mark.parametrize("context", [1, 2])
def test_rows_fill_few_shapes_and_lose_little(monkeypatch, context):
    monkeypatch.setattr(rows, "_splits", lambda: (4, context))
    random = np.random.default_rng(0)
    pairs = [rows.Pair(np.ones(n, np.int32), n - 20) for n in random.integers(300, 500, 200).tolist()]
    found = list(rows.batches([(pair, np.ones((40, 20), bool)) for pair in pairs]))
    assert len({batch.tokens.shape for batch in found}) <= 8
    assert sum(len(batch.places) for batch in found) == 8000
    assert all(batch.tokens.shape[0] % 4 == 0 and batch.masked.shape[1] % context == 0 for batch in found)
    computed, asked = sum(batch.tokens.size for batch in found), 40 * sum(len(pair.tokens) for pair in pairs)
    assert computed < 1.35 * asked


def test_a_lack_of_memory_is_one_line():
    def program(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    job = rows.Pair(np.ones(9, np.int32), 4), np.ones((3, 5), bool)
    with pytest.raises(InputError, match="a batch of 4 rows of 16 tokens does not fit into the devices' memory"):
        list(rows._run(program, rows.batches([job])))
