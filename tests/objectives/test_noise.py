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


def draw(maskable, *, stratified=False, eps=1e-3, tokens=None):
    tokens = jnp.zeros(maskable.shape, jnp.int32) if tokens is None else tokens
    return noise.mask_tokens(KEY, tokens, maskable, 63, eps=eps, stratified=stratified)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("mesh_sizes", MESHES)
def test_masks_do_not_depend_on_the_mesh(mesh_sizes, stratified):
    maskable = np.ones((16, 32), bool)
    alone = draw(jnp.asarray(maskable), stratified=stratified)
    mesh = make_mesh(mesh_sizes)
    with jax.set_mesh(mesh):
        args = global_batch(np.zeros((16, 32), np.int32), mesh), global_batch(maskable, mesh)
        over_mesh = jax.jit(lambda t, m: draw(m, stratified=stratified, tokens=t))(*args)
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


def test_each_token_is_masked_with_its_rows_ratio():
    _, masked, ratio = draw(jnp.ones((200, 2000), bool))
    share, p = np.asarray(masked).mean(1), np.asarray(ratio)
    z = (share - p) / np.sqrt(p * (1 - p) / 2000 + 1e-9)
    assert np.abs(z).max() < 4.5 and np.abs(z.mean()) < 0.3
