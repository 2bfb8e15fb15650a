"""The reverse process against a plain Python loop, and the laws of its parts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import prompts, rules
from llada_jax.sampling.generate import Options, denoise, generate, infill, sample

MASK = 3


@pytest.fixture(scope="module")
def model():
    from conftest import TINY

    model = Transformer(TINY, jax.random.key(2))
    model.ff_out[...] = model.ff_out[...] * 8.0  # clear preferences
    return model


def by_hand(model, prompt, *, gen_length, steps, block_length, visible=None, cfg_scale=0.0, banned=()):
    """Algorithm 5 of the paper, one step after the other, in float64 NumPy on the model's logits."""
    canvas = np.concatenate([prompt, np.full((len(prompt), gen_length), MASK)], 1)
    given, P, states = canvas != MASK, prompt.shape[1], []
    blocks = gen_length // block_length
    for b in range(blocks):
        end = P + (b + 1) * block_length
        masks = (canvas[:, :end] == MASK).sum(1)
        for i in range(steps // blocks):
            logits = np.asarray(model(jnp.asarray(canvas), visible), np.float64)
            if cfg_scale:
                nothing = np.asarray(model(jnp.asarray(np.where(given, MASK, canvas)), visible), np.float64)
                logits = nothing + (cfg_scale + 1) * (logits - nothing)
            logits[..., list(banned)] = -np.inf
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            p[..., MASK] = -1
            choice, sure = p.argmax(-1), p.max(-1)
            for row in range(len(canvas)):
                open_ = np.flatnonzero(canvas[row, :end] == MASK)
                k = masks[row] // (steps // blocks) + (i < masks[row] % (steps // blocks))
                for column in open_[np.argsort(-sure[row, open_], kind="stable")][:k]:
                    canvas[row, column] = choice[row, column]
            states.append(canvas.copy())
    return np.stack(states)


@pytest.mark.parametrize(
    "options",
    [
        dict(gen_length=12, steps=12, block_length=12),
        dict(gen_length=12, steps=5, block_length=12),
        dict(gen_length=12, steps=6, block_length=4),
        dict(gen_length=8, steps=4, block_length=4, cfg_scale=1.5),
    ],
)
def test_every_state_is_that_of_the_plain_loop(model, rng, options):
    prompt = rng.integers(7, 60, (3, 6))
    tokens, states = generate(model, prompt, **options, return_trajectory=True)
    np.testing.assert_array_equal(states, by_hand(model, prompt, **options))
    np.testing.assert_array_equal(states[-1], np.asarray(tokens))


def test_masks_in_the_prompt_are_filled_with_a_quota_of_their_own(model, rng):
    prompt = rng.integers(7, 60, (2, 6))
    prompt[0, 1:3] = prompt[1, 4] = MASK
    options = dict(gen_length=6, steps=6, block_length=3)
    tokens, states = generate(model, prompt, **options, return_trajectory=True)
    assert not np.any(np.asarray(tokens) == MASK)
    np.testing.assert_array_equal(states, by_hand(model, prompt, **options))


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(model, rng):
    rows = [list(rng.integers(7, 60, n)) for n in (6, 3, 5)]
    tokens, real = prompts.left_pad(rows, 2)
    options = dict(gen_length=8, steps=4, block_length=4)
    together = np.asarray(generate(model, tokens, real, **options))
    for i, row in enumerate(rows):
        alone = np.asarray(generate(model, np.asarray([row]), **options))
        np.testing.assert_array_equal(together[i, -8:], alone[0, -8:])


def test_a_suppressed_eos_is_never_written(model, rng):
    prompt, options = rng.integers(7, 60, (4, 6)), dict(gen_length=8, steps=8, block_length=8)
    free = np.asarray(generate(model, prompt, **options))[:, 6:]
    favourite = int(np.bincount(free.ravel()).argmax())
    banned = generate(model, prompt, **options, eos_id=favourite, logits_eos_inf=True)
    assert favourite in free and favourite not in np.asarray(banned)[:, 6:]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_eos_and_eot_are_committed_last_at_any_temperature(temperature):
    """The official sampler holds EOS back only at temperature 0 (its issues 137 and 139)."""
    eos, eot = 5, 6
    logits = jnp.zeros((1, 4, 8)).at[0, 0, eos].set(60.0).at[0, 1, eot].set(60.0).at[0, 2:, 1].set(50.0)
    chosen = rules.sample_tokens(jax.random.key(0), logits, temperature, MASK)
    np.testing.assert_array_equal(np.asarray(chosen)[0], [eos, eot, 1, 1])
    score = rules.confidence(logits, chosen, (eos, eot))
    everything = jnp.ones((1, 4), bool)
    two = np.asarray(rules.commit_top_k(score, everything, jnp.asarray([2])))[0]
    np.testing.assert_array_equal(two, [False, False, True, True])
    assert np.asarray(rules.commit_top_k(score, everything, jnp.asarray([4]))).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_is_never_chosen(temperature):
    logits = jnp.zeros((4, 50, 8)).at[..., MASK].set(30.0)
    assert not np.any(np.asarray(rules.sample_tokens(jax.random.key(0), logits, temperature, MASK)) == MASK)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_follows_the_tempered_softmax(temperature):
    logits = jnp.asarray([0.0, 1.0, -2.0, 9.0, 2.0, -4.0])
    draws = np.asarray(
        rules.sample_tokens(jax.random.key(1), jnp.broadcast_to(logits, (1, 40_000, 6)), temperature, MASK)
    )
    p = np.exp(np.delete(np.asarray(logits, np.float64), MASK) / temperature)
    p /= p.sum()
    counts = np.delete(np.bincount(draws[0], minlength=6), MASK)
    chi2 = ((counts - 40_000 * p) ** 2 / (40_000 * p)).sum()
    assert chi2 < 18.5  # 0.1% level, 4 degrees of freedom


def test_the_far_tail_can_be_drawn():
    """A token 18 logits below the best among 126,463 like it: 0.19% right, never drawn by ordinary float32 noise."""
    logits = jnp.full((1, 64, 126_464), -18.0).at[..., 0].set(0.0)
    other = sum(int((rules.sample_tokens(jax.random.key(i), logits, 1.0, MASK) != 0).sum()) for i in range(24))
    assert 0 < other < 12  # 2.9 expected of 1,536


def test_confidence_neither_saturates_nor_ties():
    gaps = jnp.asarray([10.0, 17.0, 25.0, 40.0])
    logits = jnp.zeros((1, 4, 5)).at[0, :, 0].set(gaps)
    score = np.asarray(rules.confidence(logits, jnp.zeros((1, 4), jnp.int32)))[0]
    np.testing.assert_allclose(score, np.asarray(gaps) - np.log(4), rtol=1e-6)


@pytest.mark.parametrize("masks, steps", [(10, 4), (3, 8), (0, 3), (32, 32)])
def test_quota_spreads_evenly_with_the_remainder_first(masks, steps):
    counts = [int(rules.tokens_per_step(jnp.asarray([masks]), steps, i)[0]) for i in range(steps)]
    assert sum(counts) == masks and counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_one_program_serves_every_prompt_of_a_shape(model, rng):
    options = dict(gen_length=4, steps=2, block_length=4)
    generate(model, rng.integers(7, 60, (2, 9)), **options)
    before = denoise._cache_size()
    with_masks = rng.integers(7, 60, (2, 9))
    with_masks[0, 2:4] = with_masks[1, 0] = MASK
    assert not np.any(generate(model, with_masks, **options) == MASK)
    assert denoise._cache_size() == before
    padded = np.ones((2, 9), np.int32)
    generate(model, with_masks, padded, **options)
    padded[0, :3] = 0
    generate(model, with_masks, padded, **options)
    assert denoise._cache_size() == before + 1  # with an attention mask it is another one, whatever it hides


def test_windows_before_the_block_see_what_one_wide_window_sees(model, rng):
    """A prompt of 30 with masks in three windows of 4, filled while the first block is, in any remasking."""
    prompt = rng.integers(7, 60, (2, 30))
    prompt[0, [1, 2, 17, 29]] = prompt[1, 22] = MASK
    for options in (dict(temperature=0.7), dict(remasking="random")):
        narrow = sample(model, prompt, gen_length=4, steps=3, block_length=4, **options)
        canvas = jnp.asarray(np.concatenate([prompt, np.full((2, 4), MASK)], 1), jnp.int32)
        whole: Any = dict(temperature=0.0, remasking="low_confidence") | options
        ids = model.config.eos_token_id, model.config.eot_token_id
        wide = Options(0, 34, 3, whole["temperature"], 0.0, whole["remasking"], False, False, MASK, *ids)
        wide = denoise(model, canvas, None, jax.random.key(0), wide)
        np.testing.assert_array_equal(narrow.tokens, wide.tokens)
        np.testing.assert_array_equal(narrow.step, wide.step)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gen_length=10, block_length=4), "gen_length 10 is not a multiple of block_length 4"),
        (dict(gen_length=8, block_length=4, steps=5), "steps 5 is not a multiple of the number of blocks, 2"),
        (dict(gen_length=64), "exceed the model's context of 64 tokens"),
        (dict(temperature=-1.0), "temperature -1.0 is negative"),
        (dict(temperature=float("nan")), "temperature nan is not a finite number"),
        (dict(temperature="hot"), "temperature 'hot' is not a finite number"),
        (dict(cfg_scale=None), "cfg_scale None is not a finite number"),
        (dict(remasking="hope"), "remasking 'hope'"),
        (dict(steps=8.0), "steps 8.0 is not a whole number"),
        (dict(eos_id=64), "eos_id 64, outside the 64 rows"),
        (dict(mask_id="x"), "mask_id 'x' is not a whole number"),
        (dict(key=0), "key must be one key, such as jax.random.key.*, not int"),
        (dict(key=np.ones(2)), "not ndarray of shape"),
        (dict(key=jax.random.split(jax.random.key(0))), r"not PRNGKeyArray of shape \(2,\)"),
        (dict(attention_mask=np.eye(2, 6)[1:] * 0), "attention_mask hides all of row 0"),
        (dict(attention_mask=np.full((1, 6), 2)), "attention_mask may hold 0 and 1 only"),
    ],
)
def test_impossible_requests_are_named(model, options, message):
    options = dict(gen_length=8, steps=8, block_length=options.get("gen_length", 8)) | options
    with pytest.raises(InputError, match=message):
        generate(model, np.full((1, 6), 9), **options)


@pytest.mark.parametrize(
    "prompt, message",
    [
        (np.zeros((1, 0)), "prompt is empty"),
        (np.full((1, 6), 9.0), "the prompt holds float64, not token ids"),
        ([[1], [2, 3]], "prompt is no array"),
    ],
)
def test_prompts_that_are_none_are_named(model, prompt, message):
    with pytest.raises(InputError, match=message):
        generate(model, prompt, gen_length=8, steps=8, block_length=8)


def test_keys_of_both_kinds_are_taken(model):
    prompt, options = np.full((1, 6), 9), dict(gen_length=4, steps=4, block_length=4, temperature=1.0)
    old, new = (generate(model, prompt, key=key(3), **options) for key in (jax.random.PRNGKey, jax.random.key))
    np.testing.assert_array_equal(old, new)


def test_infilling_fills_masks_and_nothing_else(model, rng):
    canvas = rng.integers(7, 60, (2, 9))
    canvas[0, 3:6] = canvas[1, 0] = MASK
    sampled = infill(model, canvas)
    tokens = np.asarray(sampled.tokens)
    assert not np.any(tokens == MASK)
    np.testing.assert_array_equal(np.where(canvas == MASK, MASK, tokens), canvas)
    np.testing.assert_array_equal(np.asarray(sampled.step) >= 0, canvas == MASK)
    for text, options, message in [
        (np.full((1, 4), 9), {}, "holds no mask"),
        (canvas, dict(steps=0), "steps must be positive"),
        (canvas, dict(temperature=-1.0), "temperature -1.0 is negative"),
        (np.full((1, 65), MASK), {}, "65 tokens exceed the model's context of 64"),
        (canvas + 64, {}, "outside the 64 rows"),
    ]:
        with pytest.raises(InputError, match=message):
            infill(model, text, **options)
