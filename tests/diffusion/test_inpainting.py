"""Latents that are kept stay on the straight way to the picture, under every sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import dpm_solver, flow_matching
from sana_jax.diffusion.inpainting import Kept, keep


def velocity(x, timestep, sigma):
    """Every latent depends on all of the picture's."""
    return jnp.sin(3 * x) + x.mean(axis=(1, 2), keepdims=True) * timestep / 1000 - sigma


def given():
    rng = np.random.default_rng(0)
    data, noise = rng.standard_normal((2, 2, 4, 6, 3), np.float32)
    return data, noise, rng.random((2, 4, 6, 1)) < 0.5


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("sampler", dpm_solver.SAMPLERS)
def test_the_kept_part_is_the_picture_at_each_level_with_its_own_noise(sampler, count):
    data, noise, redrawn = given()
    schedule = dpm_solver.last_steps(dpm_solver.SAMPLERS[sampler](20, 3.0), count)
    levels = np.append(schedule.sigma[1:], np.float32(0))
    x = flow_matching.interpolate(data, noise, np.full(2, schedule.sigma[0]))
    carry = x, jnp.zeros_like(x)
    for i, sigma in enumerate(levels):
        row = jax.tree.map(lambda column, i=i: column[i], schedule)
        carry = dpm_solver.step(keep(velocity, Kept(data, redrawn)), carry, row)
        x, x0 = carry
        expected = (1 - sigma) * data + sigma * noise
        np.testing.assert_allclose(np.where(redrawn, 0, x - expected), 0, atol=3e-6)
        np.testing.assert_allclose(np.where(redrawn, 0, x0 - data), 0, atol=3e-6)
    assert np.abs(np.where(redrawn, x - data, 1)).min() > 1e-4  # the rest is not the picture


@pytest.mark.parametrize("sampler", dpm_solver.SAMPLERS)
def test_latents_are_those_of_blending_after_each_step(sampler):
    data, noise, redrawn = given()
    schedule = dpm_solver.last_steps(dpm_solver.SAMPLERS[sampler](12, 3.0), 9)
    start = flow_matching.interpolate(data, noise, np.full(2, schedule.sigma[0]))
    carry, levels = (start, jnp.zeros_like(start)), np.append(schedule.sigma[1:], 0)
    for i, level in enumerate(levels):
        row = jax.tree.map(lambda column, i=i: column[i], schedule)
        x, x0 = dpm_solver.step(velocity, carry, row)
        carry = jnp.where(redrawn, x, (1 - level) * data + level * noise), x0
    ours = dpm_solver.solve(keep(velocity, Kept(data, redrawn)), start, schedule)
    np.testing.assert_allclose(ours, carry[0], atol=1e-5)


def test_where_all_is_redrawn_nothing_changes():
    data, noise, redrawn = given()
    schedule = dpm_solver.flow_dpm_solver(5, 3.0)
    everything = keep(velocity, Kept(data, np.ones_like(redrawn)))
    found = dpm_solver.solve(everything, noise, schedule)
    np.testing.assert_array_equal(found, dpm_solver.solve(velocity, noise, schedule))
