"""What scoring costs, and when a question may stop."""

import dataclasses

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax.evaluation import draws, likelihood, presets, questions, rows
from llada_jax.evaluation.harness import Settings
from llada_jax.fields import InputError, check_fields
from llada_jax.model.transformer import Transformer
from llada_jax.sampling.options import Options

MC_NUM, MINI_BATCH = 128, 8


@pytest.fixture(scope="module")
def model():
    from tiny import TINY

    return Transformer(TINY, jax.random.key(2))


def asked(lengths, prompt=20, choices=4, seed=0):
    """Questions with choices of so many tokens on average, and their ids."""
    random = np.random.default_rng(seed)
    for length in lengths:
        context = random.integers(10, 60, prompt)
        yield context, [random.integers(10, 60, length + i % 2) for i in range(choices)]


def choices_of(model, given):
    found = []
    for context, answers in given:
        pairs, _ = likelihood.read_pairs(model.config, context, answers)
        found += [questions.Choice(pair, pair.question) for pair in pairs]
    return found


def computed(choices):
    """(tokens that our batches compute, tokens of the official loop: mc_num rows of each choice, one by one)."""
    plans = [
        draws.plan(c.pair.length, MC_NUM, MINI_BATCH, draws.generator(jax.random.key(0), c.question)) for c in choices
    ]
    jobs = [(choice.pair, plan.masks) for choice, plan in zip(choices, plans, strict=True)]
    ours = sum(batch.tokens.size for batch in rows.batches(jobs))
    return ours, sum(MC_NUM * len(choice.pair.tokens) for choice in choices)


def test_short_choices_cost_less_than_a_third_of_the_official_loop(model):
    """2 to 6 tokens, as most choices of ARC or PIQA have; and the answers are those of all 2^A masks."""
    given = list(asked([2, 3, 4, 5] * 5))
    choices = choices_of(model, given)
    ours, official = computed(choices)
    assert ours < official / 3
    found = dict(
        (i, bound)
        for i, bound, _ in questions.bounds(model, choices, jax.random.key(0), mc_num=MC_NUM, mini_batch=MINI_BATCH)
    )
    exact = [
        b for context, answers in given[:2] for b in llada_jax.log_likelihood(model, context, answers, mc_num=4096)
    ]
    np.testing.assert_allclose([found[i] for i in range(len(exact))], exact, rtol=1e-5)


def test_equal_masks_are_scored_once_and_change_nothing():
    random = np.random.default_rng(0)
    plan = draws.plan(9, MC_NUM, MINI_BATCH, random)
    masked, ratio = draws.fixed_count_masks(np.random.default_rng(0), MC_NUM // MINI_BATCH, MINI_BATCH, 9)
    np.testing.assert_array_equal(plan.masks[plan.mask_of], masked)
    ce = np.random.default_rng(1).random(plan.masks.shape) * plan.masks
    assert len(plan.masks) < MC_NUM and plan.bound(ce) == pytest.approx(-np.mean(ce[plan.mask_of].sum(1) / ratio))


def run(model, choices, **options):
    results = questions.bounds(model, choices, jax.random.key(1), mc_num=MC_NUM, mini_batch=MINI_BATCH, **options)
    return {i: (bound, used) for i, bound, used in results}


@pytest.fixture(scope="module")
def decided(model):
    """A model that prefers some tokens strongly, and choices of 12 tokens that it does and does not like."""
    sharp = jax.tree.map(lambda x: x, model)
    sharp.ff_out[...] *= 6.0
    context = np.arange(10, 20)
    liked = np.asarray(llada_jax.generate(sharp, context[None], gen_length=12))[0, 10:]
    other = np.random.default_rng(0).integers(10, 60, (3, 12))
    return sharp, context, [liked, *other]


def test_a_decided_question_stops_and_keeps_its_winner(decided):
    model, context, answers = decided
    choices = choices_of(model, [(context, answers)])
    full, early = run(model, choices), run(model, choices, stop_at=0.9999)
    assert {used for _, used in full.values()} == {MC_NUM} and {used for _, used in early.values()} == {16}
    assert max(full, key=full.get) == max(early, key=early.get) == 0


def test_an_open_question_and_a_lone_text_take_all_their_draws(decided):
    model, context, answers = decided
    tie = choices_of(model, [(context, [answers[1], answers[1]])])
    alone = choices_of(model, [(context[1:], answers[:1])])
    early, full = run(model, tie + alone, stop_at=0.9999), run(model, tie + alone)
    assert {used for _, used in early.values()} == {MC_NUM} and [early[i][0] for i in range(3)] == pytest.approx(
        [full[i][0] for i in range(3)], rel=1e-6
    )
    scaled = [
        dataclasses.replace(c, scales=(1.0, s))
        for c, s in zip(choices_of(model, [(context, answers[:2])]), (9.0, 0.01), strict=True)
    ]
    full = run(model, scaled)
    assert full[0][0] > full[1][0]
    scaled[0] = dataclasses.replace(scaled[0], scales=(1.0, full[0][0] / full[1][0]))  # equal after division
    scaled[1] = dataclasses.replace(scaled[1], scales=(1.0, 1.0))
    assert {used for _, used in run(model, scaled, stop_at=0.9999).values()} == {MC_NUM}


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_hold_what_the_harness_takes(preset):
    own = {field.name for field in dataclasses.fields(Settings)}
    for found in presets.PRESETS[preset].values():
        settings = {name: value for name, value in found.settings.items() if name in own}
        sampling = {name: value for name, value in found.settings.items() if name not in own}
        check_fields(Settings, settings, preset)
        check_fields(Options, sampling, preset)
        Settings(**settings)
        Options(**sampling)


def test_presets_are_the_papers_numbers():
    of = presets.benchmark
    assert of("llada_base", "mmlu_anatomy") is of("llada_base", "mmlu") and of("llada_base", "mmlu").shots == 5
    assert of("llada_base", "hellaswag").settings == dict(mc_num=128, mini_batch=8, cfg_scale=0.0)
    assert of("llada_base_cfg", "truthfulqa_mc2").settings["cfg_scale"] == 2.0
    assert of("llada_instruct", "humaneval_instruct").settings["logits_eos_inf"]
    assert of("illada_base", "piqa").settings == {"method": "confidence"}
    assert "everything" in of("llada_base", "local_mc").unknown and of(None, "mmlu").settings == {}
    assert presets.by_settings("llada_base", ["piqa", "gsm8k", "hellaswag"])[0][1] == ["piqa", "hellaswag"]
    with pytest.raises(InputError, match="--preset=x is not one of llada_base"):
        of("x", "mmlu")
