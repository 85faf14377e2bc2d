"""DDPM as a flow: levels beside diffusers', velocities beside a network that knows the noise."""

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import DDPMScheduler

from sana_jax.diffusion import ddpm, dpm_solver, flow_matching

RNG = np.random.default_rng(0)
DATA, NOISE = (RNG.standard_normal((4, 3, 5, 2)).astype(np.float32) for _ in "xy")


def knowing(seen=None):
    """A network that returns the noise of as many rows as it is given, which it notes."""

    def noise_of(x, timestep):
        if seen is not None:
            seen.append((np.asarray(x), np.asarray(timestep)))
        return jnp.asarray(NOISE[: len(x)])

    return noise_of


def test_levels_are_those_of_diffusers():
    theirs = DDPMScheduler(1000, 1e-4, 0.02, "linear").alphas_cumprod.double().numpy()
    alpha, sigma = np.sqrt(theirs), np.sqrt(1 - theirs)
    np.testing.assert_allclose(ddpm.SCALES, alpha + sigma, rtol=1e-5)
    np.testing.assert_allclose(ddpm.SIGMAS, sigma / (alpha + sigma), rtol=1e-4)


def test_the_network_sees_the_state_and_timestep_of_ddpm():
    timestep, seen = np.array([0, 137, 700, 999]), []
    sigma = jnp.asarray(ddpm.SIGMAS[timestep], jnp.float32)
    velocity = ddpm.velocity(knowing(seen), flow_matching.interpolate(DATA, NOISE, sigma), sigma)
    ((x, told),) = seen
    np.testing.assert_array_equal(told, timestep)
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    kept = scheduler.alphas_cumprod.numpy()[timestep][:, None, None, None]
    np.testing.assert_allclose(x, np.sqrt(kept) * DATA + np.sqrt(1 - kept) * NOISE, atol=1e-5)
    # 1 / (1 - sigma) multiplies rounding errors by up to 158.
    np.testing.assert_allclose(velocity, NOISE - DATA, atol=1e-4)


def test_a_level_between_two_timesteps_gets_the_nearer_one():
    low, high = ddpm.SIGMAS[400:402]
    sigma, seen = jnp.array([low + 0.4 * (high - low), low + 0.6 * (high - low)], jnp.float32), []
    ddpm.velocity(knowing(seen), jnp.zeros((2, 3, 5, 2)), sigma)
    assert seen[0][1].tolist() == [400, 401]


def test_levels_beyond_the_last_count_as_the_last():
    x, seen = jnp.asarray(NOISE[:1]), []
    ends = [ddpm.velocity(knowing(seen), x, jnp.array([s])) for s in (0.999, 1.0, 0.001, 0.0)]
    assert [told.item() for _, told in seen] == [999, 999, 0, 0]
    assert np.isfinite(ends).all()
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[2], ends[3])


def test_the_loss_is_the_error_of_the_noise():
    """As in DDPM, although what is measured is the velocity."""
    timestep = np.array([3, 250, 600, 950])
    sigma = jnp.asarray(ddpm.SIGMAS[timestep], jnp.float32)
    guess = NOISE + 0.3 * RNG.standard_normal(NOISE.shape).astype(np.float32)
    x = flow_matching.interpolate(DATA, NOISE, sigma)
    target = flow_matching.velocity_of(DATA, NOISE)
    errors = flow_matching.row_errors(ddpm.velocity(lambda *_: guess, x, sigma), target)
    loss = flow_matching.flow_loss(errors, sigma, flow_matching.DDPM)
    np.testing.assert_allclose(loss, np.mean((guess - NOISE) ** 2), rtol=1e-4)


def test_timesteps_of_training_are_uniform():
    sigma, timestep = flow_matching.draw_levels(jax.random.key(0), 4000, flow_matching.DDPM)
    table = ddpm.SIGMAS.astype(np.float32)
    index = np.searchsorted(table, np.asarray(sigma))
    np.testing.assert_array_equal(table[index], sigma)
    np.testing.assert_allclose(timestep, 1000 * sigma, rtol=1e-6)
    share = np.histogram(index, bins=10, range=(0, 1000))[0] / 4000
    assert abs(share - 0.1).max() < 0.02  # four standard deviations


def test_samplers_reach_the_data_of_a_network_that_knows_it():
    """From the first step, above the last level of DDPM, to the last, at 0."""

    def velocity(x, timestep, sigma):
        def noise_of(x_vp, t):
            t = t.astype(int)
            scale, level = (jnp.asarray(table)[t] for table in (ddpm.SCALES, ddpm.SIGMAS))
            return (x_vp / scale - (1 - level) * DATA) / level

        return ddpm.velocity(noise_of, x, timestep[None] / 1000)

    for schedule in dpm_solver.flow_dpm_solver(20, 3.0), dpm_solver.flow_euler(20, 3.0):
        found = dpm_solver.solve(velocity, NOISE, schedule)
        assert np.linalg.norm(found - DATA) < 0.01 * np.linalg.norm(DATA)
