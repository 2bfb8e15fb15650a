"""The forward process against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.objectives import noise
from llada_jax.parallel.mesh import global_batch, make_mesh

KEY = jax.random.key(3)
MESHES = [
    dict(data=1, fsdp=8, tensor=1, context=1),
    dict(data=2, fsdp=2, tensor=2, context=1),
    dict(data=2, fsdp=1, tensor=1, context=4),
]


def draw(maskable, *, stratified=False, balanced=False, eps=1e-3, tokens=None):
    tokens = jnp.zeros(maskable.shape, jnp.int32) if tokens is None else tokens
    return noise.mask_tokens(KEY, tokens, maskable, 63, eps=eps, stratified=stratified, balanced=balanced)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("mesh_sizes", MESHES)
def test_masks_do_not_depend_on_the_mesh(mesh_sizes, stratified, balanced):
    maskable = np.ones((16, 32), bool)
    alone = draw(jnp.asarray(maskable), stratified=stratified, balanced=balanced)
    mesh = make_mesh(mesh_sizes)
    with jax.set_mesh(mesh):
        args = global_batch(np.zeros((16, 32), np.int32), mesh), global_batch(maskable, mesh)
        over_mesh = jax.jit(lambda t, m: draw(m, stratified=stratified, balanced=balanced, tokens=t))(*args)
    for a, b in zip(alone, over_mesh, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_masks_of_a_row_do_not_depend_on_the_rows_after_it():
    whole, half = (draw(jnp.ones((n, 32), bool)) for n in (16, 8))
    for a, b in zip(whole, half, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:8], np.asarray(b))


def test_nothing_outside_the_maskable_set_is_masked(rng):
    maskable = rng.random((64, 32)) < 0.5
    noisy, masked, _ = draw(jnp.asarray(maskable))
    assert not np.any(np.asarray(masked) & ~maskable)
    np.testing.assert_array_equal(np.asarray(noisy), np.where(np.asarray(masked), 63, 0))


def test_a_mask_id_in_the_text_is_not_taken_for_a_masked_position():
    tokens = jnp.full((64, 32), 63, jnp.int32)
    noisy, masked, _ = draw(jnp.ones((64, 32), bool), tokens=tokens)
    assert np.all(np.asarray(noisy) == 63)
    assert 0.4 < np.asarray(masked).mean() < 0.6


@pytest.mark.parametrize("eps", [1e-3, 0.2])
@pytest.mark.parametrize("stratified", [False, True])
def test_ratios_are_uniform_between_eps_and_one(eps, stratified):
    ratios = np.concatenate(
        [np.asarray(noise.mask_ratios(jax.random.key(i), 64, eps=eps, stratified=stratified)) for i in range(40)]
    )
    assert ratios.min() >= eps and ratios.max() < 1 + 1e-6
    t = np.sort((ratios - eps) / (1 - eps))
    distance = np.abs(t - (np.arange(len(t)) + 0.5) / len(t)).max()  # Kolmogorov-Smirnov
    assert distance < 1.63 / np.sqrt(len(t))  # 1% level


def test_stratified_ratios_hit_every_stratum_once():
    t = (np.asarray(noise.mask_ratios(KEY, 16, stratified=True)) - 1e-3) / (1 - 1e-3)
    strata = np.sort(np.floor(((t - t.min()) * 16) + 0.5))
    np.testing.assert_array_equal(strata, np.arange(16))


@pytest.mark.parametrize("stratified", [False, True])
def test_balanced_ratios_are_the_same_values_in_another_order(stratified):
    draw = lambda **options: np.sort(np.asarray(noise.mask_ratios(stratified=stratified, rows=60, **options)))
    values_key, _ = jax.random.split(KEY)
    np.testing.assert_array_equal(draw(key=KEY, balanced=True), draw(key=values_key))


@pytest.mark.parametrize("count", [1, 7, 12, 20, 1280])
def test_every_place_of_an_order_that_is_spread_may_have_any_number(count):
    orders = np.asarray(jax.vmap(lambda key: noise.spread(key, count))(jax.random.split(KEY, 2000)))
    assert np.all(np.sort(orders, axis=1) == np.arange(count))
    parts = min(count, 20)  # of the range: how often each place has a number of it
    share = np.stack([(orders * parts // count == part).mean(0) for part in range(parts)])
    assert np.abs(share - 1 / parts).max() < 5.5 * np.sqrt(1 / parts / 2000)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("devices, rows", [(256, 5), (64, 20), (128, 10), (16, 80), (32, 7)])
def test_devices_have_as_much_to_score_as_each_other(devices, rows, stratified):
    def surplus(balanced):
        """Of the device with most, in rows, over the mean one."""
        draw = lambda key: noise.mask_ratios(key, devices * rows, stratified=stratified, balanced=balanced)
        asked = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 50))).reshape(50, devices, rows).sum(-1)
        return (asked.max(-1) - asked.mean(-1)).mean()

    assert surplus(balanced=True) < 0.3
    assert surplus(balanced=False) > 1.2


def test_each_token_is_masked_with_its_rows_ratio():
    _, masked, ratio = draw(jnp.ones((200, 2000), bool))
    share, p = np.asarray(masked).mean(1), np.asarray(ratio)
    z = (share - p) / np.sqrt(p * (1 - p) / 2000 + 1e-9)
    assert np.abs(z).max() < 4.5 and np.abs(z.mean()) < 0.3
