"""The bound against the official numbers, against all masks, and against the theory that it comes from."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from reference import load, vectors

import llada_jax
from llada_jax.evaluation import draws, likelihood, rows
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.objectives import noise
from llada_jax.objectives.diffusion import sft
from llada_jax.objectives.elbo import weighted_loss
from llada_jax.parallel.mesh import make_mesh

ARRAYS, META = vectors("loglik")
PROMPT = [9, 20, 31]


@pytest.fixture(scope="module")
def model():
    from tiny import TINY

    model = Transformer(TINY, jax.random.key(2))
    model.ff_out[...] *= 4.0  # clear preferences
    model.blocks.attn_out[...] *= 8.0  # that hang on the context
    return model


def stored_noise(case):
    """prompt, answer, masked [N, P + A] and mask_ratio [N, P + A] of a case, and its guidance."""
    arrays, meta = ARRAYS[case], META[case]
    length = arrays["perturbed_seq"].shape[-1]
    masked = arrays["perturbed_seq"].reshape(-1, length) == meta["mask_id"]
    ratio = arrays["p_mask"].reshape(masked.shape)
    return load(meta["ckpt"]), arrays["prompt"], arrays["answer"], masked, ratio, meta["cfg_scale"]


@pytest.mark.parametrize("case", sorted(META))
def test_estimates_for_given_masks_are_the_official_ones(case):
    found = llada_jax.log_likelihood_from_masks(*stored_noise(case))
    batches = -ARRAYS[case]["loss_per_batch"]
    np.testing.assert_allclose(found.reshape(len(batches), -1).mean(axis=1), batches, rtol=1e-5)
    np.testing.assert_allclose(found.mean(), ARRAYS[case]["log_likelihood"][0], rtol=1e-5)


@pytest.mark.parametrize("columns", [(0, 9), (7, 0), (7, 7)])
def test_masks_and_ratios_may_cover_the_answer_alone(columns):
    model, prompt, answer, masked, ratio, scale = stored_noise("l01")
    whole = llada_jax.log_likelihood_from_masks(model, prompt, answer, masked, ratio, scale)
    parts = masked[:, columns[0] :], ratio[:, columns[1] :] if columns[1] != 9 else ratio[:, 0]
    np.testing.assert_array_equal(
        llada_jax.log_likelihood_from_masks(model, prompt, answer, *parts, cfg_scale=scale), whole
    )


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 2, 2, 1)])
def test_a_mesh_changes_nothing(sizes):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor", "context"), sizes, strict=True)))
    model, prompt, answer, masked, ratio, scale = stored_noise("l03_cfg")
    alone = llada_jax.log_likelihood_from_masks(model, prompt, answer, masked[:7], ratio[:7], scale)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda key: Transformer(model.config, key), jax.random.key(0))
        shardings = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec), like)
        split = jax.device_put(model, shardings)
        found = llada_jax.log_likelihood_from_masks(split, prompt, answer, masked[:7], ratio[:7], scale)
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def by_hand(model, answer):
    """log p of every answer token under every mask of the answer, float64 [2^A, A], from the model's logits."""
    A = len(answer)
    masked = np.array(list(itertools.product([False, True], repeat=A)))
    canvas = np.concatenate([np.tile(PROMPT, (2**A, 1)), np.where(masked, model.config.mask_token_id, answer)], 1)
    logits = np.asarray(model(jnp.asarray(canvas, jnp.int32)), np.float64)[:, len(PROMPT) :]
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return masked, np.take_along_axis(logits, np.broadcast_to(answer, masked.shape)[..., None], -1)[..., 0]


def over_orders(model, answer):
    """log p of the answer by the chain rule in each of the A! orders."""
    masked, log_p = by_hand(model, answer)
    row = {tuple(mask): i for i, mask in enumerate(masked)}
    found = []
    for order in itertools.permutations(range(len(answer))):
        left, total = [True] * len(answer), 0.0
        for i in order:
            total += log_p[row[tuple(left)], i]
            left[i] = False
        found.append(total)
    return np.asarray(found)


def expected(model, answer):
    """The estimator's exact expectation: every number of masked tokens, every mask of that number, equally likely."""
    masked, log_p = by_hand(model, answer)
    A, count = len(answer), masked.sum(1)
    estimates = np.where(masked, log_p, 0).sum(1) * A / np.maximum(count, 1)
    return np.mean([estimates[count == n].mean() for n in range(1, A + 1)]), masked, estimates


ANSWER = np.asarray([40, 7, 12, 55, 7])


def test_the_mean_over_orders_is_the_mean_over_masks(model):
    orders, (over_masks, _, _) = over_orders(model, ANSWER), expected(model, ANSWER)
    bound, log_p = likelihood.any_order_log_likelihood(model, PROMPT, ANSWER)
    assert bound == pytest.approx(orders.mean(), rel=1e-5) and bound == pytest.approx(over_masks, rel=1e-5)
    assert log_p == pytest.approx(np.logaddexp.reduce(orders) - math.log(len(orders)), rel=1e-5)
    assert orders.std() > 0.5 and bound < log_p - 0.1  # the order matters here, so Jensen's inequality is strict


def test_the_bound_is_tight_where_the_order_makes_no_difference(model):
    """Without attention every masked token is predicted from MASK alone: independent draws from one distribution."""
    blind = jax.tree.map(lambda x: x, model)
    blind.blocks.attn_out[...] = jnp.zeros_like(blind.blocks.attn_out[...])
    bound, log_p = likelihood.any_order_log_likelihood(blind, PROMPT, ANSWER)
    assert over_orders(blind, ANSWER).std() < 1e-4
    assert bound == pytest.approx(log_p, rel=1e-6)


def test_the_objective_of_training_integrates_to_the_bound(model):
    """∫ p^(n-1) (1-p)^(A-n) dp = 1 / (n · C(A, n)): what a mask of n tokens weighs over all p, here as its 1/ratio."""
    masked, _ = by_hand(model, ANSWER)
    masked = masked[1:]  # the first masks nothing
    A, n = len(ANSWER), masked.sum(1)
    ratio = n * np.asarray([math.comb(A, k) for k in n])
    most, ratio = ratio.max(), ratio / ratio.max()  # a mask ratio is at most 1
    tokens = np.tile(np.concatenate([PROMPT, ANSWER]), (len(masked), 1))
    with_prompt = np.concatenate([np.zeros((len(masked), len(PROMPT)), bool), masked], axis=1)
    sft = (
        llada_jax.sft_loss(model, tokens, with_prompt, ratio, np.full(len(masked), len(PROMPT)))
        * len(masked)
        * A
        / most
    )
    pretrain = llada_jax.pretrain_loss(model, tokens, with_prompt, ratio) * tokens.size / most
    bound, log_p = likelihood.any_order_log_likelihood(model, PROMPT, ANSWER)
    assert float(sft) == pytest.approx(-bound, rel=1e-5) and float(pretrain) == pytest.approx(-bound, rel=1e-5)
    assert -bound > -log_p


def test_the_loss_that_training_reports_estimates_the_bound(model):
    rows, A = 6000, len(ANSWER)
    tokens = jnp.tile(jnp.concatenate([jnp.asarray(PROMPT), ANSWER]), (rows, 1))
    maskable = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= len(PROMPT), tokens.shape)
    ones = jnp.ones_like(tokens)
    batch = dict(tokens=tokens, segment_ids=ones, maskable=maskable, answer_length=jnp.full(rows, A))
    objective = ConfigDict(dict(eps=1e-3, stratified=True, balanced=True, attention="full"))
    noisy = sft(batch, jax.random.key(0), model.config, objective)
    loss, sums = jax.jit(weighted_loss)(model, noisy)
    _, masked, estimates = expected(model, ANSWER)
    drawn = np.asarray(noisy.weights)[:, len(PROMPT) :] > 0
    count = drawn.sum(1)
    each = estimates[drawn @ (1 << np.arange(A)[::-1])] * count / A / np.asarray(noisy.ratio)
    bound, _ = likelihood.any_order_log_likelihood(model, PROMPT, ANSWER)
    for reported in (float(loss) * A, float(sums["elbo_sum"]) / rows):
        assert reported == pytest.approx(-each.mean(), rel=1e-4)
    assert abs(each.mean() - bound) < 3.5 * each.std() / math.sqrt(rows) + 1e-3 * A * abs(bound)


EIGHT = np.asarray([40, 7, 12, 55, 7, 33, 18, 61])


def test_the_estimator_is_unbiased_within_its_confidence_interval(model):
    """128 mini-batches of 8, of which all masks are 255: enough to draw, too few to enumerate."""
    exact, _ = likelihood.any_order_log_likelihood(model, PROMPT, EIGHT)
    options = dict(mc_num=8, batch_size=8)
    found = [llada_jax.log_likelihood(model, PROMPT, EIGHT, **options, key=jax.random.key(seed)) for seed in range(128)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - exact) < 3 * error < 0.06 * abs(exact)


def test_drawn_masks_are_what_the_estimate_is_made_of(model):
    masked, ratio = draws.fixed_count_masks(
        draws.generator(jax.random.key(4), np.asarray(PROMPT, np.int32).tobytes()), 12, 8, 8
    )
    mean = llada_jax.log_likelihood_from_masks(model, PROMPT, EIGHT, masked, ratio).mean()
    found = llada_jax.log_likelihood(model, PROMPT, EIGHT, mc_num=96, batch_size=8, key=jax.random.key(4))
    assert found == pytest.approx(mean, rel=1e-6)


def test_a_fixed_count_varies_less_than_1_over_t(model):
    """Measured here, at a bound of -50.1 nats: one sample has a standard deviation of 20.0 nats with a fixed count and
    63.9 with 1/t; a mean of eight 5.1 (counts spread evenly; independent ones would give 7.1) and 22.7."""
    exact, masked, estimates = expected(model, EIGHT)
    A, rows, batches = len(EIGHT), 8, 5000
    number = lambda masked_NA: masked_NA @ (1 << np.arange(A)[::-1])
    fixed = estimates[number(draws.fixed_count_masks(np.random.default_rng(0), batches, rows, A)[0])]
    ratio = np.asarray(noise.mask_ratios(jax.random.key(1), batches * rows))
    drawn = np.asarray(noise.masks(jax.random.key(2), jnp.ones((batches * rows, A), bool), jnp.asarray(ratio)))
    one_over_t = estimates[number(drawn)] * drawn.sum(1) / A / ratio
    spread = fixed.reshape(batches, rows).mean(1)
    for samples in (fixed, one_over_t):
        assert abs(samples.mean() - exact) < 3.5 * samples.std() / math.sqrt(batches * rows) + 1e-3 * A * abs(exact)
    assert fixed.std() < 0.5 * one_over_t.std()
    assert spread.std() < 0.8 * fixed.std() / math.sqrt(rows)


def official_counts(k, rows, length):
    """forward_process of the official code."""
    import torch

    x = torch.round(torch.linspace(float(k), k + (rows - 1) * (length / rows), steps=rows)).long()
    return (((x - 1) % length) + 1).numpy()


@pytest.mark.parametrize("rows, length", [(16, 7), (8, 12), (8, 9), (1, 5), (16, 250)])
def test_counts_are_the_official_ones_save_for_halves(rows, length):
    k = np.arange(1, length + 1)
    ours = draws.stratified_counts(k, rows, length)
    halves = np.arange(rows) * length * 2 % (2 * rows) == rows
    official = np.stack([official_counts(i, rows, length) for i in k])
    np.testing.assert_array_equal(ours[:, ~halves], official[:, ~halves])
    assert np.abs((ours - official) % length).max() <= (1 if halves.any() else 0)
    assert (np.sort(ours, axis=0) == k[:, None]).all()  # each row meets every count equally often: unbiased
    assert (np.sort(official, axis=0) != k[:, None]).any(axis=0).tolist() == halves.tolist()


def test_masks_have_their_counts_and_are_uniform():
    masked, ratio = draws.fixed_count_masks(np.random.default_rng(1), 3000, 4, 6)
    np.testing.assert_array_equal(masked.sum(axis=1), np.round(ratio * 6))
    two = masked[masked.sum(axis=1) == 2]
    pairs, counts = np.unique(two, axis=0, return_counts=True)
    assert len(pairs) == 15 and ((counts - len(two) / 15) ** 2 / (len(two) / 15)).sum() < 36  # 0.1% level


def test_a_remainder_is_dropped_and_the_key_decides(model):
    run = lambda mc_num, seed: llada_jax.log_likelihood(
        model, PROMPT, ANSWER, mc_num=mc_num, batch_size=4, key=jax.random.key(seed)
    )
    assert run(11, 0) == run(8, 0) != run(8, 1)
    assert run(8, 0) == llada_jax.log_likelihood(model, PROMPT, ANSWER, mc_num=8, batch_size=4)


def test_one_program_serves_every_length_of_a_bucket(model):
    options = dict(mc_num=8, batch_size=4)
    llada_jax.log_likelihood(model, PROMPT, EIGHT, cfg_scale=0.5, **options)
    before = rows._score._cache_size()
    llada_jax.log_likelihood(model, PROMPT[::-1], EIGHT[::-1], cfg_scale=2.0, **options, key=jax.random.key(9))
    llada_jax.log_likelihood(model, PROMPT * 2, EIGHT[:5], cfg_scale=0.5, **options)
    llada_jax.log_likelihood(model, [], EIGHT[:6], cfg_scale=0.5, **options)
    assert rows._score._cache_size() == before


def test_logits_exist_for_some_masked_tokens_at_a_time_only(tiny):
    large = Transformer(dataclasses.replace(tiny, vocab_size=5003, embedding_size=5003), jax.random.key(0))
    tokens, ones = jnp.zeros((16, 64), jnp.int32), jnp.ones(16, jnp.int32)
    program = rows._score.lower(large, tokens, ones, ones, jnp.ones((16, 32), bool), scale=0.0, guided=False)
    assert program.compile().memory_analysis().temp_size_in_bytes < 4 * 16 * 32 * 5003


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(answer=[]), "the answer is empty"),
        (dict(answer=[5, 64]), "the answer holds 64, outside the 64 rows of the embedding"),
        (dict(prompt=[-1]), "the prompt holds -1, outside"),
        (dict(prompt=[[5]]), r"the prompt has shape \(1, 1\)"),
        (dict(prompt=[0.5]), "the prompt holds float64"),
        (dict(prompt=[5] * 60), r"prompt \(60\) and answer \(5\) exceed the model's context of 64 tokens"),
        (dict(mc_num=8), "mc_num 8 and batch_size 16: need 1 <= batch_size <= mc_num"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(mc_num=0), "mc_num 0"),
        (dict(mc_num="8"), "mc_num '8' is not a whole number"),
        (dict(batch_size=2.5), "batch_size 2.5 is not a whole number"),
        (dict(cfg_scale=-1.0), "cfg_scale -1.0 is negative"),
        (dict(cfg_scale=float("inf")), "cfg_scale inf is not a finite number"),
        (dict(key=0), "key must be one key"),
    ],
)
def test_impossible_requests_are_named(model, arguments, message):
    with pytest.raises(InputError, match=message):
        llada_jax.log_likelihood(model, **(dict(prompt=PROMPT, answer=ANSWER) | arguments))


@pytest.mark.parametrize(
    "masked, ratio, message",
    [
        (np.ones((2, 4), bool), np.ones(2), r"masked has shape \(2, 4\); it must be \[masks, 5\] or \[masks, 8\]"),
        (np.ones(5, bool), np.ones(5), r"masked has shape \(5,\)"),
        (np.ones((2, 5), bool), np.ones(3), r"mask_ratio has shape \(3,\)"),
        (np.ones((2, 8), bool), np.ones(2), "masked covers tokens of the prompt"),
        (np.ones((2, 5), bool), np.zeros(2), "mask_ratio must be positive"),
        (np.ones((2, 5), bool), np.full(2, 1.5), "mask_ratio must be positive, and at most 1"),
        (np.ones((2, 5), bool), "x", "mask_ratio holds <U1"),
        (np.full((2, 5), 7), np.ones(2), "masked may hold 0 and 1 only"),
        ([[1], [1, 0]], np.ones(2), "masked is no array"),
    ],
)
def test_impossible_masks_are_named(model, masked, ratio, message):
    with pytest.raises(InputError, match=message):
        llada_jax.log_likelihood_from_masks(model, PROMPT, ANSWER, masked, ratio)


def test_weights_that_are_not_finite_are_named(model):
    broken = jax.tree.map(lambda x: x, model)
    broken.ff_out[...] = jnp.full_like(broken.ff_out[...], jnp.nan)
    for score in (llada_jax.log_likelihood, llada_jax.confidence_score):
        with pytest.raises(InputError, match="scores are not finite: its weights hold NaN or overflow"):
            score(broken, PROMPT, ANSWER)


@pytest.mark.parametrize(
    "tokens, place, message",
    [
        ([], {}, "the text is empty"),
        ([7] * 9, dict(max_length=1), "max_length 1 must be from 2 to the model's context, 64"),
        ([7] * 9, dict(max_length=65), "max_length 65 must be"),
        ([7] * 9, dict(max_length=4, context_length=4), "context_length 4 must be from 1 to 3"),
    ],
)
def test_impossible_windows_are_named(model, tokens, place, message):
    with pytest.raises(InputError, match=message):
        llada_jax.rolling_log_likelihood(model, tokens, **place)


def test_as_many_prompts_as_answers_are_needed(model):
    with pytest.raises(InputError, match="2 prompts and 1 answers"):
        llada_jax.log_likelihood(model, [PROMPT, PROMPT], [ANSWER])


def test_long_answers_are_not_enumerated(model):
    with pytest.raises(InputError, match=r"17 tokens has 2\^17 masks; at most 16"):
        likelihood.any_order_log_likelihood(model, PROMPT, [7] * 17)
