"""The official sampler's own states, step for step; and where it is corrected, the difference.

tests/golden/reference/generate.* was made by the official generate.py on tiny random models, see test_reference.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import REFERENCE, load, vectors

import llada_jax
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import denoise, rules
from llada_jax.sampling.generate import _completion

ARRAYS, META = vectors("generate")
DRAWN = {"g15_random_remasking", "g16_temperature"}
CORRECTED = {"g11_mask_in_prompt", "g17_mask_id_predicted"}


def generate(case, attention_mask=..., **changes):
    """Our tokens and [start, and the state after every step] for the arguments of a case."""
    arrays, meta = ARRAYS[case], META[case]
    visible = arrays.get("attention_mask") if attention_mask is ... else attention_mask
    kwargs = meta["kwargs"] | dict(eos_id=meta["eos_id"], eot_id=meta["eot_id"]) | changes
    tokens, states = llada_jax.generate(load(meta["ckpt"]), arrays["prompt"], visible, **kwargs, return_trajectory=True)
    np.testing.assert_array_equal(states[-1], tokens)
    return np.concatenate([arrays["x_steps"][:1], states])


def reverse_with(case, draws, **changes):
    """[start, and the state after every step] of the compiled program for the arguments of a case and given draws."""
    arrays, meta = ARRAYS[case], META[case]
    kwargs = meta["kwargs"] | dict(eos_id=meta["eos_id"], eot_id=meta["eot_id"]) | changes
    job = _completion(load(meta["ckpt"]), arrays["prompt"], None, kwargs.pop("gen_length"), kwargs)
    more = job.canvas.shape[1] - job.length
    draws = [None if x is None else jnp.pad(x, [(0, 0), (0, 0), (more, 0)] + [(0, 0)] * (x.ndim - 3)) for x in draws]
    canvas, visible = jnp.asarray(job.canvas), jnp.asarray(job.visible)
    stats = job._stats(denoise.run(job.weights, canvas, visible, job.program, job.settings, tuple(draws)))
    return np.concatenate([arrays["x_steps"][:1], stats.trajectory(kwargs["steps"])])


@pytest.mark.parametrize("case", sorted(set(META) - DRAWN - CORRECTED))
def test_every_state_at_temperature_0_is_the_official_one(case):
    np.testing.assert_array_equal(generate(case), ARRAYS[case]["x_steps"])
    np.testing.assert_array_equal(ARRAYS[case]["x_steps"][-1], ARRAYS[case]["output"])


@pytest.mark.parametrize("case", ["g05_cfg"])
def test_guidance_needs_no_attention_mask(case):
    """The official code stops with a NameError; its vector carries a mask of ones, which changes nothing."""
    np.testing.assert_array_equal(generate(case, attention_mask=None), ARRAYS[case]["x_steps"])


def test_random_remasking_follows_given_confidences():
    case = "g15_random_remasking"
    states = reverse_with(case, (None, jnp.asarray(ARRAYS[case]["random_confidence"])))
    np.testing.assert_array_equal(states, ARRAYS[case]["x_steps"])


def gumbel_noise(uniform):
    """-log(-log u) of float64 draws, in float32."""
    return jnp.asarray(-np.log(-np.log(uniform)), jnp.float32)


def test_sampling_at_a_temperature_follows_given_noise():
    case = "g16_temperature"
    states = reverse_with(case, (gumbel_noise(ARRAYS[case]["uniform_noise"]), None))
    np.testing.assert_array_equal(states, ARRAYS[case]["x_steps"])


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_noise_decides_as_the_official_float64_noise_does(temperature):
    arrays = ARRAYS["gumbel"]
    uniform, result = arrays.get(f"uniform_t{temperature}"), arrays[f"result_t{temperature}"]
    noise = None if uniform is None else gumbel_noise(uniform)
    chosen = rules.sample_tokens(jax.random.key(0), arrays["logits"], temperature, noise_BWV=noise)
    np.testing.assert_array_equal(chosen, result.argmax(-1))
    if temperature:
        score = arrays["logits"] + temperature * np.asarray(noise)
        np.testing.assert_allclose(score, np.log(result), atol=1e-5)


def test_quotas_are_the_official_ones():
    for table in json.loads((REFERENCE / "generate.json").read_text())["num_transfer_tokens"]:
        masks, steps = jnp.asarray(table["mask_num"]), table["steps"]
        found = np.stack([rules.tokens_per_step(masks, steps, i) for i in range(steps)], axis=1)
        np.testing.assert_array_equal(found, table["result"])


def test_a_predicted_mask_is_replaced_by_the_next_best_token():
    """The official sampler commits MASK, which uses up the transfer and leaves masks in the answer."""
    case = "g17_mask_id_predicted"
    mask, official, ours = META[case]["kwargs"]["mask_id"], ARRAYS[case]["x_steps"], generate(case)
    assert META[case]["mask_token_transferred"] > 0 and (official[-1] == mask).any() and not (ours[-1] == mask).any()
    left = lambda states: (states == mask).sum(axis=-1)  # [steps + 1, B]
    for row in range(official.shape[1]):
        late = np.flatnonzero(left(official)[:, row] > left(ours)[:, row])
        first = late[0] if len(late) else len(official)
        np.testing.assert_array_equal(ours[:first, row], official[:first, row])


def test_masks_in_the_prompt_get_a_quota_of_their_own():
    """The official sampler fills them out of the block's quota, and as many masks stay at the end."""
    case = "g11_mask_in_prompt"
    kwargs, prompt = META[case]["kwargs"], ARRAYS[case]["prompt"]
    mask, official, ours = kwargs["mask_id"], ARRAYS[case]["x_steps"], generate(case)
    given = (prompt == mask).sum()
    assert given > 0 and (official[-1] == mask).sum() == given and not (ours[-1] == mask).any()
    steps = kwargs["steps"] * kwargs["block_length"] // kwargs["gen_length"]
    committed = -np.diff((ours == mask).sum(axis=(1, 2)))
    quota = [
        int(rules.tokens_per_step(jnp.asarray([kwargs["block_length"] + given]), steps, i)[0]) for i in range(steps)
    ]
    assert committed[:steps].tolist() == quota
    now = official[1] != mask  # the first step sees the same canvas: what the official code is surest of is ours, too
    np.testing.assert_array_equal(ours[1][now], official[1][now])


def test_eos_and_eot_are_held_back_at_a_temperature(rng):
    """The official sampler holds back only EoT there (its issues 137 and 139) and would commit EOS at once."""
    case, temperature = "g09_confidence_eos_eot_inf", 0.3
    meta, start = META[case], ARRAYS[case]["x_steps"][0]
    model, mask, eot = load(meta["ckpt"]), meta["kwargs"]["mask_id"], meta["eot_id"]
    noise = rng.gumbel(size=(meta["kwargs"]["steps"], *start.shape, 512)).astype(np.float32)
    draws = jnp.asarray(noise), None
    free = reverse_with(case, draws, temperature=temperature, confidence_eos_eot_inf=False)
    (eos,) = free[1][free[1] != free[0]]  # what is committed first becomes EOS
    states = reverse_with(case, draws, temperature=temperature, eos_id=int(eos))
    would_be_first = 0
    for i, x_S in enumerate(states[:-1, 0]):
        logits_SV = np.asarray(model(jnp.asarray(x_S[None])))[0]
        noisy_SV = logits_SV + temperature * noise[i, 0]
        choice_S = np.where(np.arange(512) == mask, -np.inf, noisy_SV).argmax(axis=1)
        open_N = np.flatnonzero(x_S == mask)
        (column,) = np.flatnonzero(states[i + 1, 0] != x_S)
        assert states[i + 1, 0, column] == choice_S[column]
        others = np.setdiff1d(choice_S[open_N], [eos, eot])
        assert choice_S[column] not in (eos, eot) or len(others) == 0
        logits_SV = np.where(np.arange(512) == eot, -np.inf, logits_SV)
        p_N = np.exp(logits_SV - np.logaddexp.reduce(logits_SV, axis=1, keepdims=True))[open_N, choice_S[open_N]]
        would_be_first += len(others) > 0 and choice_S[open_N[p_N.argmax()]] == eos
    assert would_be_first > 0


def test_noise_of_a_row_depends_on_its_number_alone():
    key, draw = jax.random.key(3), jax.random.gumbel
    noise = jax.jit(lambda rows, columns: rules._gumbel(rules._keys(key, rows, columns), 8))
    three = noise(jnp.arange(3), jnp.asarray([7, 6, 5, 4]))
    np.testing.assert_array_equal(three[1:, 1:3], noise(jnp.asarray([1, 2]), jnp.asarray([6, 5])))
    at_once = [draw(key, (rows, 4, 8), mode="high")[0] for rows in (1, 3)]
    assert (at_once[0] != at_once[1]).any()  # why it is not drawn for the batch at once


@pytest.mark.parametrize("options", [dict(temperature=0.7), dict(temperature=1.0, remasking="random")])
def test_a_sampled_row_does_not_depend_on_its_neighbours(options, rng):
    """Not on how many they are, on what they hold, on how far they pad it, or on masks in their prompts."""
    model = load("ckpt_a_mha")
    prompt, options = rng.integers(7, 490, (3, 7)), options | dict(gen_length=8, steps=4, block_length=4)
    together = np.asarray(llada_jax.generate(model, prompt, **options, key=jax.random.key(5)))
    other = np.concatenate([[[508, 11, 508]], rng.integers(7, 490, (1, 3))])
    padded, real = np.concatenate([other, prompt[:2]], axis=1), np.ones((2, 10), int)
    padded[0, 3:], real[1, :3] = rng.integers(7, 490, 7), 0
    beside = np.asarray(llada_jax.generate(model, padded, real, **options, key=jax.random.key(5)))
    np.testing.assert_array_equal(beside[1, -8:], together[1, -8:])
    again = np.asarray(llada_jax.generate(model, prompt, **options, key=jax.random.key(6)))
    assert (again != together).any()


def test_samples_follow_the_exact_probabilities(tiny):
    """Over the rows of one batch, in two columns that are drawn in the same step."""
    model, rows, mask = Transformer(tiny, jax.random.key(2)), 4096, tiny.mask_token_id
    model.ff_out[...] *= 2.0
    prompt = np.asarray([[9, 20]])
    logits = np.asarray(model(jnp.asarray([[9, 20, mask, mask]])), np.float64)[0, 2:] / 0.8
    p = np.exp(logits) * (np.arange(64) != mask)
    p /= p.sum(axis=1, keepdims=True)
    options = dict(gen_length=2, steps=1, block_length=2, temperature=0.8, key=jax.random.key(1))
    tokens = np.asarray(llada_jax.generate(model, np.repeat(prompt, rows, 0), **options))[:, 2:]
    for column in range(2):
        expected, counts = rows * p[column], np.bincount(tokens[:, column], minlength=64)
        common = expected > 5
        chi2, freedom = ((counts - expected) ** 2 / np.maximum(expected, 1))[common].sum(), common.sum()
        assert freedom > 10 and chi2 < freedom + 4 * np.sqrt(2 * freedom)
    same = (p[0] * p[1]).sum()
    assert abs((tokens[:, 0] == tokens[:, 1]).mean() - same) < 4 * np.sqrt(same / rows)


def test_more_steps_than_masks_change_nothing(rng):
    model, prompt = load("ckpt_a_mha"), rng.integers(7, 490, (2, 5))
    exact, many = (
        llada_jax.generate(model, prompt, gen_length=8, block_length=4, steps=steps, return_trajectory=True)[1]
        for steps in (8, 12)
    )
    assert many.shape == (12, 2, 13)
    np.testing.assert_array_equal(many[[0, 1, 2, 3, 6, 7, 8, 9]], exact)
    np.testing.assert_array_equal(many[[4, 5, 10, 11]], exact[[3, 3, 7, 7]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompt=[5, 6]), r"the prompt has shape \(2,\)"),
        (dict(prompt=[[5, 512]]), "the prompt holds 512, outside the 512 rows"),
        (dict(prompt=[[5, -1]]), "the prompt holds -1, outside"),
        (dict(prompt=[[5]], mask_id=600), "mask_id 600, outside"),
        (dict(prompt=[[5, 6]], attention_mask=[[1]]), r"attention_mask has shape \(1, 1\), the prompt \(1, 2\)"),
        (dict(prompt=[[5]], cfg_scale=-0.5), "cfg_scale is -0.5; it must be a number from 0"),
    ],
)
def test_impossible_prompts_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        llada_jax.generate(load("ckpt_a_mha"), **arguments, gen_length=4, steps=4, block_length=4)
