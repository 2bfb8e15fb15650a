"""The objectives against float64 NumPy, and accumulation against a whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.objectives.autoregressive import next_token
from llada_jax.objectives.diffusion import pretrain, pretrain_loss, sft, sft_loss
from llada_jax.objectives.elbo import weighted_loss

KEY = jax.random.key(5)


def objective(attention="documents", **changes):
    return ConfigDict(dict(eps=1e-3, stratified=False, balanced=True, attention=attention) | changes)


def make_batch(rng, rows=6, length=16):
    tokens = rng.integers(7, 60, (rows, length)).astype(np.int32)
    segment_ids = np.ones((rows, length), np.int32)
    segment_ids[:, 10:] = 2
    segment_ids[::2, 13:] = 0
    maskable = segment_ids > 0
    maskable[:, :3] = False
    fields = tokens, segment_ids, maskable, maskable.sum(1).astype(np.int32)
    return dict(zip(("tokens", "segment_ids", "maskable", "answer_length"), map(jnp.asarray, fields), strict=True))


def cross_entropy64(model, noisy):
    """-log softmax at the targets, float64, from the model's own float32 logits; [B, L]."""
    logits = np.asarray(model(noisy.inputs, noisy.mask), np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, np.asarray(noisy.targets)[..., None], -1)[..., 0]


@pytest.fixture
def model(tiny):
    return Transformer(tiny, jax.random.key(0))


@pytest.mark.parametrize("attention", ["full", "padding", "documents"])
def test_pretraining_loss_is_eq_3_divided_by_all_tokens(model, rng, attention):
    batch = make_batch(rng)
    noisy = pretrain(batch, KEY, model.config, objective(attention))
    loss, sums = weighted_loss(model, noisy)
    masked, p = np.asarray(noisy.weights) > 0, np.asarray(noisy.ratio, np.float64)[:, None]
    ce = cross_entropy64(model, noisy)
    expected = (ce * masked / p).sum() / np.asarray(batch["maskable"]).sum()
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    np.testing.assert_allclose(float(sums["elbo_sum"]), (ce * masked / p).sum(), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(sums["ce_sum"]).sum(), (ce * masked).sum(), rtol=1e-5)
    assert np.asarray(sums["ce_count"]).sum() == masked.sum()


def test_sft_loss_is_divided_by_the_answer_length_of_each_row(model, rng):
    batch = make_batch(rng)
    noisy = sft(batch, KEY, model.config, objective("padding"))
    loss, _ = weighted_loss(model, noisy)
    masked, p = np.asarray(noisy.weights) > 0, np.asarray(noisy.ratio, np.float64)
    rows = (cross_entropy64(model, noisy) * masked).sum(1) / p / np.asarray(batch["answer_length"])
    np.testing.assert_allclose(float(loss), rows.mean(), rtol=1e-5)


def test_the_prompt_is_never_masked_in_sft(model, rng):
    noisy = sft(make_batch(rng), KEY, model.config, objective("padding"))
    assert not np.any(np.asarray(noisy.weights)[:, :3])


def test_autoregressive_loss_is_the_mean_over_next_tokens_of_the_same_document(tiny, rng):
    model = Transformer(tiny.__class__(**{**tiny.__dict__, "causal": True}), jax.random.key(0))
    batch = make_batch(rng)
    noisy = next_token(batch, KEY, model.config, objective())
    segment, maskable = np.asarray(batch["segment_ids"]), np.asarray(batch["maskable"])
    asked = np.zeros(segment.shape, bool)
    asked[:, :-1] = maskable[:, 1:] & (segment[:, 1:] == segment[:, :-1])
    np.testing.assert_array_equal(np.asarray(noisy.weights) > 0, asked)
    np.testing.assert_array_equal(np.asarray(noisy.targets)[:, :-1], np.asarray(batch["tokens"])[:, 1:])
    loss, _ = weighted_loss(model, noisy)
    np.testing.assert_allclose(float(loss), cross_entropy64(model, noisy)[asked].mean(), rtol=1e-5)


def test_a_causal_model_does_not_see_what_comes_later(tiny, rng):
    model = Transformer(tiny.__class__(**{**tiny.__dict__, "causal": True}), jax.random.key(0))
    tokens = rng.integers(0, 60, (2, 12)).astype(np.int32)
    changed = tokens.copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % 60
    before, after = np.asarray(model(jnp.asarray(tokens))), np.asarray(model(jnp.asarray(changed)))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-3


def test_with_nothing_masked_loss_and_gradient_are_zero(model, rng):
    noisy = pretrain(make_batch(rng), KEY, model.config, objective())
    noisy.weights = jnp.zeros_like(noisy.weights)
    (loss, _), grads = jax.value_and_grad(weighted_loss, has_aux=True)(model, noisy)
    assert float(loss) == 0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


def test_documents_do_not_see_each_other_only_in_documents_mode(model, rng):
    batch = make_batch(rng)
    changed = batch | {"tokens": batch["tokens"].at[:, 11].set(5)}
    for attention, seen in (("documents", False), ("padding", True)):
        hidden = []
        for b in (batch, changed):
            noisy = next_token(b, KEY, model.config, objective(attention))
            hidden.append(np.asarray(model.hidden(noisy.inputs, noisy.mask))[:, :10])
        assert (np.abs(hidden[0] - hidden[1]).max() > 1e-6) == seen


TOKENS, HALF = np.full((2, 6), 9), np.full(2, 0.5)
MASKED = TOKENS > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens=TOKENS + 60), "the batch holds 69, outside the 64 rows"),
        (dict(tokens=TOKENS + 0.5), "tokens holds float64; it must be whole numbers"),
        (dict(tokens=[[1], [2, 3]]), "tokens is no array"),
        (dict(masked=MASKED[:, :3]), r"masked \(2, 3\)"),
        (dict(masked=TOKENS), "masked may hold 0 and 1 only"),
        (dict(masked=None), "masked holds object"),
        (dict(mask_ratio=0 * HALF), "mask_ratio must be positive, and at most 1, where something is masked"),
        (dict(mask_ratio=3 * HALF), "at most 1"),
        (dict(mask_ratio=np.nan * HALF), "mask_ratio must be positive"),
        (dict(mask_ratio=np.ones(3)), r"mask_ratio has shape \(3,\)"),
        (dict(prompt_lengths=[1, 7]), "prompt_lengths must be from 0 to 6"),
        (dict(prompt_lengths=[-1, 2]), "prompt_lengths must be from 0 to 6"),
        (dict(prompt_lengths=[0.5, 2]), "prompt_lengths holds float64"),
        (dict(prompt_lengths=[1]), r"prompt_lengths has shape \(1,\)"),
    ],
)
def test_impossible_noise_is_named(model, changes, message):
    noise = dict(tokens=TOKENS, masked=MASKED, mask_ratio=HALF) | changes
    with pytest.raises(InputError, match=message):
        sft_loss(model, **(dict(prompt_lengths=[1, 2]) | noise))
    if "prompt_lengths" not in changes:
        with pytest.raises(InputError, match=message):
            pretrain_loss(model, **noise)


def test_noise_may_be_traced_and_ratios_without_masks_anything(model):
    loss = jax.jit(sft_loss)(model, TOKENS, MASKED, HALF, np.array([1, 2]))
    np.testing.assert_allclose(loss, sft_loss(model, TOKENS, MASKED, HALF, [1, 2]), rtol=1e-6)
    assert pretrain_loss(model, TOKENS, ~MASKED, 0 * HALF) == 0
