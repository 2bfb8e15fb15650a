"""Schedules at their published corners; AdamW against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax.config import run_config
from llada_jax.fields import InputError
from llada_jax.model.transformer import Transformer
from llada_jax.training import optimizer

TOKENS = 1280 * 4096


def rate(phases, step, total=438_690):
    schedule = optimizer.make_schedule(phases, total_steps=total, tokens_per_step=TOKENS)
    on_host, on_device = float(schedule(step)), float(schedule(jnp.int32(step)))
    assert on_host == pytest.approx(on_device, rel=1e-6)
    return on_device


@pytest.mark.parametrize(
    "step, expected",
    [(0, 0), (1000, 2e-4), (2000, 4e-4), (228_881, 4e-4), (228_882, 1e-4), (381_470, 1e-4), (438_690, 1e-5)],
)
def test_llada_pretraining_schedule(step, expected):
    np.testing.assert_allclose(rate(optimizer.LLADA_PRETRAIN, step), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "step, expected", [(25, 1.25e-5), (50, 2.5e-5), (900, 2.5e-5), (950, 1.375e-5), (1000, 2.5e-6)]
)
def test_llada_sft_schedule(step, expected):
    np.testing.assert_allclose(rate(optimizer.LLADA_SFT, step, total=1000), expected, rtol=1e-5)


def test_cosine_is_half_way_in_the_middle_and_ends_where_it_says():
    phases = (("constant", 1.0, "10 steps"), ("cosine", 0.2, "100%"))
    values = [rate(phases, s, total=110) for s in (9, 10, 60, 110)]
    np.testing.assert_allclose(values, [1.0, 1.0, 0.6, 0.2], rtol=1e-6)


def test_a_short_run_sees_only_the_warm_up():
    assert rate(optimizer.LLADA_PRETRAIN, 20, total=20) == pytest.approx(4e-6)


@pytest.mark.parametrize(
    "phases, message",
    [
        ((), "at least one phase"),
        (("linear", 1.0, "10 steps"), "'linear' is no .kind, rate, until."),
        ((("linear", 1.0),), "is no .kind, rate, until."),
        ((("linear", "fast", "10 steps"),), "the rate 'fast' is no number"),
        ((("linear", float("nan"), "10 steps"),), "the rate nan is no number"),
        ((("linear", 1.0, "soon"),), "can't read 'soon'"),
        ((("linear", 1.0, "1.2.3 steps"),), "can't read '1.2.3 steps'"),
        ((("wavy", 1.0, "10 steps"),), "'wavy' is not one of linear, constant, cosine"),
    ],
)
def test_unreadable_schedules_are_named(phases, message):
    with pytest.raises(InputError, match=message):
        rate(phases, 0)


@pytest.mark.parametrize("decay, clip", [("matrices", 1.0), ("all", 0.0)])
def test_adamw_against_float64_numpy(tiny, rng, decay, clip):
    config = run_config("tiny").optimizer
    config.update(dict(schedule=(("linear", 1e-2, "2 steps"), ("constant", 1e-2, "100%")), decay=decay, clip_norm=clip))
    update = optimizer.make_optimizer(config, total_steps=10, tokens_per_step=1)
    model = Transformer(tiny, jax.random.key(0))
    leaves, tree = jax.tree.flatten(model)
    is_matrix = jax.tree.leaves(optimizer.is_matrix(model))
    state, p = update.init(model), [np.asarray(x, np.float64) for x in leaves]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t in range(1, 5):
        g = [rng.normal(size=x.shape).astype(np.float32) for x in p]
        updates, state = update.update(jax.tree.unflatten(tree, map(jnp.asarray, g)), state, model)
        model = optax.apply_updates(model, updates)
        norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g))
        scale = min(1.0, clip / norm) if clip else 1.0
        rate_t = 1e-2 * min(t - 1, 2) / 2
        for i, gi in enumerate(x.astype(np.float64) * scale for x in g):
            m[i], v[i] = 0.9 * m[i] + 0.1 * gi, 0.95 * v[i] + 0.05 * gi**2
            step = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
            p[i] -= rate_t * (step + 0.1 * p[i] * (decay == "all" or is_matrix[i]))
    for got, want in zip(jax.tree.leaves(model), p, strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
def test_updates_that_are_made_are_those_of_optax_and_the_others_leave_the_state(rng, mu_dtype):
    config = run_config("tiny").optimizer
    config.update(dict(schedule=(("linear", 1e-2, "9 steps"),), decay="all", clip_norm=0.0, mu_dtype=mu_dtype))
    ours = optimizer.make_optimizer(config, total_steps=10, tokens_per_step=1)
    theirs = optax.adamw(
        optimizer.make_schedule(config.schedule, total_steps=10, tokens_per_step=1),
        b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mu_dtype=mu_dtype,
    )  # fmt: skip
    params = {"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)}
    states = ours.init(params), theirs.init(params)
    for ok in (True, False, True, True):
        grads = {"w": jnp.asarray(rng.normal(size=(8, 16)) if ok else np.full((8, 16), np.nan), jnp.float32)}
        updates, after = ours.update(grads, states[0], params, ok=jnp.asarray(ok))
        if ok:
            expected, theirs_after = theirs.update(grads, states[1], params)
            np.testing.assert_array_equal(updates["w"], expected["w"])
            states = after, theirs_after
        assert jax.tree.structure(after[1]) == jax.tree.structure(states[1])
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(states[1]), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_norms_are_not_matrices_though_they_are_stacked(tiny):
    marks = jax.tree_util.tree_flatten_with_path(optimizer.is_matrix(Transformer(tiny, jax.random.key(0))))[0]
    spared = {jax.tree_util.keystr(path, simple=True, separator=".") for path, mark in marks if not mark}
    assert spared == {"blocks.attn_norm.value", "blocks.ff_norm.value", "ln_f.value"}
    assert len(marks) == 12
