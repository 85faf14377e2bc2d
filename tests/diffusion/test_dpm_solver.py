"""The schedules and steps against diffusers' schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sana_jax.diffusion import dpm_solver, flow_matching
from tests import toy


def scheduler(sampler: str, shift: float, num_steps: int):
    if sampler == "flow_euler":
        reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        reference = DPMSolverMultistepScheduler(
            flow_shift=shift, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    reference.set_timesteps(num_steps)
    return reference


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 14, 15, 20, 28, 50, 100])
def test_grid_is_that_of_diffusers(num_steps, shift):
    ours = dpm_solver.flow_dpm_solver(num_steps, shift)
    theirs = scheduler("flow_dpm_solver", shift, num_steps)
    np.testing.assert_array_equal(ours.timestep, theirs.timesteps.numpy())
    np.testing.assert_array_equal(ours.sigma, theirs.sigmas.numpy()[:-1])

    ours = dpm_solver.flow_euler(num_steps, shift)
    theirs = scheduler("flow_euler", shift, num_steps)
    np.testing.assert_allclose(ours.timestep, theirs.timesteps.numpy(), rtol=2e-7)
    np.testing.assert_allclose(ours.sigma, theirs.sigmas.numpy()[:-1], rtol=2e-7)


def test_published_timesteps():
    """What the network sees in 20 steps with shift 3."""
    expected = (999, 982, 963, 944, 922, 899, 874, 847, 817, 785)
    expected += (749, 710, 666, 617, 562, 499, 428, 345, 249, 136)
    np.testing.assert_array_equal(dpm_solver.flow_dpm_solver(20, 3.0).timestep, expected)


def field(x, timestep, sigma):
    """A velocity that depends on everything; works in torch and in jax."""
    return 0.7 * x + (x * x + 1) ** -0.5 * (timestep / 1000) - sigma


@pytest.mark.parametrize("num_steps", [1, 2, 3, 14, 20])
@pytest.mark.parametrize("sampler", ["flow_dpm_solver", "flow_euler"])
def test_solution_is_that_of_diffusers(sampler, num_steps):
    noise = np.random.default_rng(0).standard_normal((2, 4, 6, 3), np.float32)
    reference = scheduler(sampler, 3.0, num_steps)
    x = torch.tensor(noise)
    for i, timestep in enumerate(reference.timesteps):
        v = field(x, timestep.float(), reference.sigmas[i])
        x = reference.step(v, timestep, x, return_dict=False)[0]
    schedule = dpm_solver.SAMPLERS[sampler](num_steps, 3.0)
    ours = jax.jit(lambda noise: dpm_solver.solve(field, noise, schedule))(noise)
    # diffusers takes differences of float32 logarithms; ours are float64 until the end.
    toy.assert_close(ours, x.numpy(), 1e-5, sampler)


def test_straight_flow_is_solved_exactly():
    """Where the velocity is noise - data everywhere, every sampler ends at the data."""
    rng = np.random.default_rng(0)
    data, noise = rng.standard_normal((2, 1, 3, 3, 2), np.float32)
    for sampler in dpm_solver.SAMPLERS.values():
        schedule = sampler(7, 3.0)
        start = (1 - schedule.sigma[0]) * data + schedule.sigma[0] * noise
        end = dpm_solver.solve(lambda x, t, s: jnp.asarray(noise - data), start, schedule)
        np.testing.assert_allclose(end, data, atol=1e-5)


def test_second_order_converges_faster():
    """Halving the steps' size divides the error by about 4, not 2, as a 2M solver should."""
    noise = np.full((1, 1, 1, 1), 0.8, np.float32)

    def velocity(x, timestep, sigma):  # a smooth field, without the truncated timestep
        return jnp.sin(3 * x) + sigma * x

    def solve(num_steps):
        schedule = dpm_solver.flow_dpm_solver(num_steps, 1.0)
        return float(dpm_solver.solve(velocity, noise, schedule)[0, 0, 0, 0])

    exact = solve(960)
    coarse, fine = abs(solve(30) - exact), abs(solve(60) - exact)
    assert coarse / fine > 3


@pytest.mark.parametrize("num_steps, count", [(20, 20), (20, 12), (20, 2), (14, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("sampler", ["flow_dpm_solver", "flow_euler"])
def test_the_last_steps_are_those_of_diffusers_from_its_begin_index(sampler, num_steps, count):
    """The first of them is of first order, and the second takes its history from the first."""
    data, noise = np.random.default_rng(0).standard_normal((2, 2, 4, 6, 3), np.float32)
    reference = scheduler(sampler, 3.0, num_steps)
    timesteps = reference.timesteps[num_steps - count :]
    reference.set_begin_index(num_steps - count)
    clean, noisy = torch.tensor(data), torch.tensor(noise)
    if sampler == "flow_euler":
        x = reference.scale_noise(clean, timesteps[:1], noisy)
    else:
        x = reference.add_noise(clean, noisy, timesteps[:1])
    schedule = dpm_solver.last_steps(dpm_solver.SAMPLERS[sampler](num_steps, 3.0), count)
    assert len(schedule.sigma) == count and schedule.correct[0] == 0
    start = flow_matching.interpolate(data, noise, np.full(2, schedule.sigma[0]))
    toy.assert_close(start, x.numpy(), 1e-6, "the start")
    for i, timestep in enumerate(timesteps, num_steps - count):
        v = field(x, timestep.float(), reference.sigmas[i])
        x = reference.step(v, timestep, x, return_dict=False)[0]
    ours = dpm_solver.solve(field, start, schedule)
    toy.assert_close(ours, x.numpy(), 1e-5, sampler)


@pytest.mark.parametrize("sampler", ["flow_dpm_solver", "flow_euler"])
def test_all_steps_are_the_schedule_to_the_bit(sampler):
    schedule = dpm_solver.SAMPLERS[sampler](20, 3.0)
    columns, same = map(jax.tree.leaves, (dpm_solver.last_steps(schedule, 20), schedule))
    assert columns
    for found, expected in zip(columns, same, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
