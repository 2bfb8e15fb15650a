"""The reverse process against a plain Python loop, and the laws of its parts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from llada_jax import inputs
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.parallel.mesh import make_mesh
from llada_jax.sampling import denoise, rules
from llada_jax.sampling.cache import prepare
from llada_jax.sampling.generate import generate, infill, stream

MASK = 3


@pytest.fixture(scope="module")
def model():
    from tiny import TINY

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
    tokens, real = inputs.left_pad(rows, 2)
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
    chosen = rules.sample_tokens(jax.random.key(0), rules.without(logits, MASK), temperature)
    np.testing.assert_array_equal(np.asarray(chosen)[0], [eos, eot, 1, 1])
    score = rules.confidence(rules.without(logits, eos, eot), chosen)
    everything = jnp.ones((1, 4), bool)
    two = np.asarray(rules.commit_top_k(score, everything, jnp.asarray([2])))[0]
    np.testing.assert_array_equal(two, [False, False, True, True])
    assert np.asarray(rules.commit_top_k(score, everything, jnp.asarray([4]))).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_is_never_chosen(temperature):
    logits = jnp.zeros((4, 50, 8)).at[..., MASK].set(30.0)
    assert not np.any(
        np.asarray(rules.sample_tokens(jax.random.key(0), rules.without(logits, MASK), temperature)) == MASK
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_follows_the_tempered_softmax(temperature):
    logits = jnp.asarray([0.0, 1.0, -2.0, 9.0, 2.0, -4.0])
    draws = np.asarray(
        rules.sample_tokens(
            jax.random.key(1), rules.without(jnp.broadcast_to(logits, (1, 40_000, 6)), MASK), temperature
        )
    )
    p = np.exp(np.delete(np.asarray(logits, np.float64), MASK) / temperature)
    p /= p.sum()
    counts = np.delete(np.bincount(draws[0], minlength=6), MASK)
    chi2 = ((counts - 40_000 * p) ** 2 / (40_000 * p)).sum()
    assert chi2 < 18.5  # 0.1% level, 4 degrees of freedom


def test_the_far_tail_can_be_drawn():
    """A token 18 logits below the best among 126,463 like it: 0.19% right, never drawn by ordinary float32 noise."""
    logits = jnp.full((1, 64, 126_464), -18.0).at[..., 0].set(0.0)
    other = sum(int((rules.sample_tokens(jax.random.key(i), logits, 1.0) != 0).sum()) for i in range(3, 6))
    assert 0 < other < 5  # 0.4 expected of 192; ordinary noise gives none for any key


def test_confidence_neither_saturates_nor_ties():
    gaps = jnp.asarray([10.0, 17.0, 25.0, 40.0])
    logits = jnp.zeros((1, 4, 5)).at[0, :, 0].set(gaps)
    score = np.asarray(rules.confidence(logits, jnp.zeros((1, 4), jnp.int32)))[0]
    np.testing.assert_allclose(score, np.asarray(gaps) - np.log(4), rtol=1e-6)


@pytest.mark.parametrize("masks, steps", [(10, 4), (3, 8), (0, 3), (32, 32)])
def test_quota_spreads_evenly_with_the_remainder_first(masks, steps):
    counts = [int(rules.tokens_per_step(jnp.asarray([masks]), steps, i)[0]) for i in range(steps)]
    assert sum(counts) == masks and counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_nothing_compiles_again_within_a_bucket(model, rng):
    """30 calls: prompt lengths, masks in them, padding, temperature, guidance, thresholds and step counts differ."""
    kinds = (dict(cfg_scale=0.5), dict(threshold=0.3), dict(cache="dual", remasking="random"))
    for kind in kinds:
        generate(model, rng.integers(7, 60, (2, 9)), gen_length=8, block_length=4, **kind)
    before = denoise.run._cache_size()
    for i in range(30):
        prompt = rng.integers(7, 60, (2, 3 + i % 20))
        prompt[i % 2, 1] = MASK if i % 3 else 8
        real = np.ones(prompt.shape, np.int32)
        real[0, : i % 2] = 0
        options = dict(temperature=i % 4 / 2, key=jax.random.key(i), logits_eos_inf=i % 5 == 0)
        kind = dict(kinds[i % 3])
        kind |= [dict(cfg_scale=0.1 + i), dict(threshold=i / 30), dict(refresh_every=i % 4)][i % 3]
        if "threshold" not in kind:
            options["steps"] = 2 + 2 * (i % 6)
        tokens = generate(model, prompt, real, gen_length=4 * (1 + i % 2), block_length=4, **options, **kind)
        assert not np.any(np.asarray(tokens)[real.sum(1).argmax()] == MASK)
    assert denoise.run._cache_size() == before


def test_windows_before_the_block_see_what_one_wide_window_sees(model, rng):
    """A prompt of 30 with masks in three windows of 4, filled while the first block is, in any remasking."""
    prompt = rng.integers(7, 60, (2, 30))
    prompt[0, [1, 2, 17, 29]] = prompt[1, 22] = MASK
    canvas = np.concatenate([prompt, np.full((2, 4), MASK)], 1)
    for options in (dict(temperature=0.7), dict(remasking="random")):
        _, narrow = generate(model, prompt, gen_length=4, steps=3, block_length=4, return_stats=True, **options)
        wide = infill(model, canvas, steps=3, **options)
        np.testing.assert_array_equal(narrow.tokens, wide.tokens)
        np.testing.assert_array_equal(narrow.step, wide.step)


@pytest.mark.parametrize("cache", ["none", "dual", "two_block"])
def test_a_stream_ends_where_generate_does_and_shows_the_way(model, rng, cache):
    prompt = rng.integers(7, 60, (2, 5))
    options = dict(gen_length=12, block_length=4, threshold=0.2, cache=cache)
    tokens, stats = generate(model, prompt, **options, return_stats=True)
    updates = list(stream(model, prompt, **options))
    assert [u.done for u in updates] == [False] * (len(updates) - 1) + [True]
    np.testing.assert_array_equal([u.tokens for u in updates], stats.trajectory())
    for name in ("step", "probability", "full_passes", "window_passes"):
        np.testing.assert_array_equal(getattr(updates[-1], name), getattr(stats, name))
    blocks = list(stream(model, prompt, every="block", **options))
    assert [int((u.tokens[:, 5:] != MASK).sum()) for u in blocks] == [8, 16, 24]
    np.testing.assert_array_equal(blocks[-1].tokens, tokens)


def test_a_stream_that_is_left_computes_no_more(model, rng):
    """A caller that stops reading between steps has made the passes that it saw, and no other."""
    updates = stream(model, rng.integers(7, 60, (1, 5)), gen_length=8)
    first = next(updates)
    updates.close()
    assert first.full_passes == 1 and (first.tokens[:, 5:] != MASK).sum() == 1


def by_hand_cached(model, prompt, *, gen_length, block_length, threshold, cache, look_around=0):
    """The block-wise caches by their definition: keys and values of a column change only when a pass computes it.

    Float64 NumPy (tests/plain.py); a pass over some columns sees the others as they were when last computed.
    """
    c, weights = model.config, plain.parameters(model)
    B, P = prompt.shape
    S, W = P + gen_length, block_length
    canvas = np.concatenate([prompt, np.full((B, gen_length), MASK)], 1)
    states, passes, kept = [], [], None
    for block in range(gen_length // W):
        begin, end = P + block * W, P + (block + 1) * W
        first = True
        while (canvas[:, begin:end] == MASK).any():
            columns = np.arange(max(begin - look_around, 0), min(end + look_around, S))
            if first and (cache == "dual" or block == 0):
                columns = np.arange(S)
            elif first:
                columns = np.arange(begin - W, min(end + look_around, S))
            passes.append(len(columns) == S and first)
            logits, kept = plain.forward_columns(weights, c, canvas, columns, kept)
            first = False
            p = np.exp(plain.log_softmax(logits))
            p[..., MASK] = 0
            open_ = canvas[:, columns] == MASK
            open_ &= (columns >= begin) & (columns < end)
            best = np.where(open_, p.max(-1), -1)
            commit = open_ & ((p.max(-1) >= threshold) | (best == best.max(1, keepdims=True)))
            canvas[:, columns] = np.where(commit, p.argmax(-1), canvas[:, columns])
            states.append(canvas.copy())
    return np.stack(states), sum(passes)


@pytest.mark.parametrize("cache, look_around", [("dual", 0), ("dual", 3), ("two_block", 0), ("two_block", 2)])
def test_caches_keep_what_they_say(model, rng, cache, look_around):
    prompt = rng.integers(7, 60, (2, 7))
    options = dict(gen_length=16, block_length=4, threshold=0.15, cache=cache)
    states, full = by_hand_cached(model, prompt, **options, look_around=look_around)
    _, stats = generate(model, prompt, **options, look_around=look_around, return_stats=True)
    np.testing.assert_array_equal(stats.trajectory(), states)
    assert stats.full_passes == full and stats.window_passes == len(states) - full


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_the_exact_cache_is_the_block_causal_model_computed_anew(model, rng, threshold):
    """Clean blocks never see noisy ones, so their keys do not change: equal to full passes under that mask."""
    prompt = rng.integers(7, 60, (2, 9))
    options = dict(gen_length=16, block_length=4, cache="exact", threshold=threshold, return_stats=True)
    cached, anew = (generate(model, prompt, **options, refresh_every=n)[1] for n in (0, 1))
    np.testing.assert_array_equal(cached.trajectory(), anew.trajectory())
    assert cached.full_passes == 1 and anew.window_passes == 0
    # and that is the model under a block-causal mask, counted from the prompt's end
    canvas = np.concatenate([prompt, np.full((2, 16), MASK)], 1)
    block = (np.arange(25) - 9) // 4
    logits = plain.forward(plain.parameters(model), model.config, canvas, (block[:, None] >= block)[None])
    p = np.exp(plain.log_softmax(logits))
    p[..., MASK] = 0
    states = cached.trajectory()
    committed = states[0] != canvas
    assert (p.argmax(-1)[committed] == states[0][committed]).all() and not committed[:, 13:].any()


def test_guidance_works_with_every_cache(model, rng):
    prompt = rng.integers(7, 60, (2, 6))
    options = dict(gen_length=8, block_length=4, cfg_scale=1.5, return_stats=True)
    plain_ = generate(model, prompt, **options)[1].trajectory()
    for cache in ("prefix", "dual", "two_block"):
        anew = generate(model, prompt, **options, cache=cache, refresh_every=1)[1]
        np.testing.assert_array_equal(anew.trajectory(), plain_)
        cached = generate(model, prompt, **options, cache=cache)[1]
        assert cached.window_passes and not np.any(np.asarray(cached.tokens) == MASK)
    first = [generate(model, prompt, **options, cache=c)[1].trajectory()[0] for c in ("dual", "two_block")]
    np.testing.assert_array_equal(first, [plain_[0]] * 2)


@pytest.mark.parametrize("cache", ["none", pytest.param("dual", marks=pytest.mark.slow), "two_block"])
def test_stopping_early_changes_nothing_before_the_end(model, rng, cache):
    """Per row and for the batch; what follows a finished row's last block is filled up with EOS."""
    prompt = rng.integers(7, 60, (3, 6))
    options = dict(gen_length=16, block_length=4, cache=cache)
    free = np.asarray(generate(model, prompt, **options))[:, 6:]
    eos = int(free[0, 5])  # in the second block of the first row at the latest
    _, stopped = generate(model, prompt, **options, eos_id=eos, stop_at_eos=True, return_stats=True)
    ended = np.asarray(stopped.tokens)[:, 6:]
    for row in range(3):
        found = np.flatnonzero(free[row] == eos)
        last = 16 if not len(found) else (found[0] // 4 + 1) * 4
        alone = np.asarray(generate(model, prompt[row : row + 1], **options, eos_id=eos, stop_at_eos=True))[0, 6:]
        np.testing.assert_array_equal(ended[row, :last], free[row, :last])
        np.testing.assert_array_equal(ended[row], alone)
        assert (ended[row, last:] == eos).all()
    assert (free[0] == eos).any() and stopped.full_passes + stopped.window_passes <= 16


def test_prompts_of_different_lengths_are_a_list(model, rng):
    rows = [rng.integers(7, 60, n).tolist() for n in (6, 3, 9)]
    together = np.asarray(generate(model, rows, gen_length=8, block_length=4))
    assert together.shape == (3, 17)
    for row, tokens in zip(rows, together, strict=True):
        alone = np.asarray(generate(model, [row], gen_length=8, block_length=4))
        np.testing.assert_array_equal(tokens[-8:], alone[0, -8:])


@pytest.mark.parametrize("cache", ["dual", "two_block"])
def test_infilling_in_blocks_with_a_cache(model, rng, cache):
    canvas = rng.integers(7, 60, (2, 22))
    canvas[0, [3, 4, 12, 13, 14, 20]] = canvas[1, [8, 9, 21]] = MASK
    filled = infill(model, canvas, block_length=4, cache=cache)
    assert not np.any(np.asarray(filled.tokens) == MASK) and filled.window_passes
    np.testing.assert_array_equal(np.asarray(filled.step) >= 0, canvas == MASK)
    anew = infill(model, canvas, block_length=4, cache=cache, refresh_every=1)
    np.testing.assert_array_equal(anew.tokens, infill(model, canvas, block_length=4).tokens)


@pytest.mark.parametrize(
    "sizes, options",
    [
        (dict(data=2, fsdp=2, tensor=2), dict(cache="dual", threshold=0.2)),
        pytest.param(dict(data=1, fsdp=4, tensor=2), dict(cache="two_block", temperature=0.7), marks=pytest.mark.slow),
        (dict(data=2, fsdp=1, tensor=2, context=2), dict(remasking="random")),
        pytest.param(dict(data=1, fsdp=1, tensor=1), dict(temperature=0.7), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_tokens_of_one_device(model, rng, sizes, options):
    prompt = rng.integers(7, 60, (3, 7))
    alone = np.asarray(generate(model, prompt, gen_length=8, block_length=4, **options))
    sizes = dict(context=1) | sizes
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda key: Transformer(model.config, key))(jax.random.key(0))
        place = lambda x, like: jax.device_put(x, like.sharding)
        spread = jax.tree.map(place, model, spread)
        weights = prepare(spread, gather="temperature" not in options)
        found = generate(weights, prompt, gen_length=8, block_length=4, **options)
        np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gen_length=10, block_length=4), "gen_length 10 is not a multiple of block_length 4"),
        (dict(gen_length=8, block_length=4, steps=5), "steps 5 is not a multiple of the number of blocks, 2"),
        (dict(gen_length=64), "70 tokens exceed the model's context of 64 tokens"),
        (dict(temperature=-1.0), "temperature is -1.0; it must be a number from 0 to"),
        (dict(temperature=float("nan")), "temperature is nan; it must be a number"),
        (dict(temperature="hot"), "temperature is 'hot'; it must be a number"),
        (dict(cfg_scale=None), "cfg_scale is None; it must be a number"),
        (dict(remasking="hope"), "remasking is 'hope'; it must be one of low_confidence, margin, entropy, random"),
        (dict(cache="all"), "cache is 'all'; it must be one of none, prefix, dual, two_block, exact"),
        (dict(steps=8.0), "steps is 8.0; it must be a whole number from 1 to .*, or None"),
        (dict(steps=0), "steps is 0; it must be"),
        (dict(threshold=0.9), "steps and threshold exclude each other"),
        (dict(steps=None, threshold=0.9, factor=1), "threshold and factor exclude each other"),
        (dict(steps=None, threshold=1.5), "threshold is 1.5; it must be a number from 0 to 1, or None"),
        (dict(look_around=2), "look_around needs the cache dual or two_block"),
        (dict(eos_id=64), "eos_id 64, outside the 64 rows"),
        (dict(mask_id="x"), "mask_id is 'x'; it must be a whole number"),
        (dict(remaskin="random"), "remaskin: no such field; did you mean remasking"),
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
        ([[1], [2, "x"]], "prompt is no array|the prompt holds"),
        ([[1], []], "the prompt is empty"),
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
        (canvas, dict(block_length=10), "block_length 10 is above 9, the length of the text"),
        (canvas, dict(variable_length=True), "a text with masks to fill has its length"),
        (np.full((1, 65), MASK), {}, "65 tokens exceed the model's context of 64"),
        (canvas + 64, {}, "outside the 64 rows"),
    ]:
        with pytest.raises(InputError, match=message):
            infill(model, text, **options)


@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"threshold": 0.9}, {"temperature": 1.0}], ids=str)
def test_weights_that_are_not_finite_end_in_one_line(model, options):
    broken = jax.tree.map(lambda x: x * jnp.nan, model)
    with pytest.raises(InputError, match="not finite"):
        generate(broken, [[1, 2, 3]], gen_length=8, block_length=4, **options)
