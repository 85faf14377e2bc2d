"""The few-step sampler in a flow's coordinates, against diffusers' scheduler in TrigFlow's."""

import inspect
import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SCMScheduler
from diffusers.schedulers import scheduling_scm

from sana_jax.diffusion import dpm_solver, scm, trigflow
from tests import toy
from tests.diffusion.test_trigflow import network

SCHEDULES = [(1.5708, 0.0), (1.5708, 1.3, 0.0), scm.PAPER[4], (1.1, 0.5, 0.2, 0.0)]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_the_angles_called_diffusers_are_its_own(steps):
    scheduler = SCMScheduler()
    more = {} if steps == 2 else dict(intermediate_timesteps=None)
    scheduler.set_timesteps(steps, **more)
    found = scm.named_angles("diffusers", steps)
    np.testing.assert_allclose(found, scheduler.timesteps.numpy(), rtol=1e-6, atol=1e-7)
    scm.check_angles(found)
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    assert parameters["max_timesteps"].default == scm.MAX_ANGLE


def test_the_paper_has_other_angles_in_four_steps():
    assert scm.named_angles(None, 4) == scm.named_angles("paper", 4) == scm.PAPER[4]
    assert np.abs(np.subtract(scm.PAPER[4], scm.named_angles("diffusers", 4))).max() > 0.15
    assert scm.named_angles(None, 1) == (math.pi / 2, 0.0)
    assert scm.named_angles(None, 3) == scm.named_angles("diffusers", 3)
    with pytest.raises(scm.BadAngles, match="of 1, 2, 4 steps, not 3"):
        scm.named_angles("paper", 3)


@pytest.mark.parametrize(
    "angles, words",
    [
        ([0.0], "two angles or more"),
        ([1.0, 0.5], "the last is 0.5 instead of 0"),
        ([1.6, 0.0], "1.6 is not in 0 .. pi/2"),
        ([0.0, 0.0], "0 is not in 0 .. pi/2"),
        ([1.0, 1.0, 0.0], "1 comes after 1"),
        ([1.0, 0.5, 0.7, 0.0], "0.7 comes after 0.5"),
        ([1.0, float("nan"), 0.0], "nan comes after 1"),
    ],
)
def test_other_angles_are_refused(angles, words):
    with pytest.raises(scm.BadAngles, match=words):
        scm.check_angles(angles)


@pytest.mark.parametrize("angles", SCHEDULES)
def test_solution_is_that_of_diffusers(angles, monkeypatch):
    """Its state is TrigFlow's times sigma_data, which it needs; ours is the flow's."""
    shape = (2, 3, 4, 2)
    noise = np.random.default_rng(0).standard_normal((len(angles), *shape), np.float32)
    left = iter(torch.tensor(noise[1:]))
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *_, **__: next(left))
    scheduler = SCMScheduler()
    scheduler.set_timesteps(len(angles) - 1, list(angles), None, None, None)
    x = torch.tensor(noise[0]) * scheduler.config.sigma_data
    for angle in scheduler.timesteps[:-1]:
        given = jnp.asarray((x / scheduler.config.sigma_data).numpy()), jnp.full(1, float(angle))
        f = torch.tensor(np.array(trigflow.velocity(network, *given, 0.45)))
        x, data = scheduler.step(f * scheduler.config.sigma_data, angle, x, return_dict=False)
    theirs = (data / scheduler.config.sigma_data).numpy()

    schedule = scm.scm(angles)
    start = scm.pure_noise(jnp.asarray(noise[0]), schedule.sigma[0])
    found = dpm_solver.solve(
        lambda x, timestep, sigma: network(x, timestep[None] / 1000, 0.45),
        start,
        schedule,
        jnp.asarray(noise[1:].swapaxes(0, 1)),
    )
    toy.assert_close(found, theirs, 1e-5, str(angles))


def test_known_data_are_found_in_any_number_of_steps():
    rng = np.random.default_rng(0)
    data = rng.standard_normal((1, 3, 3, 2), np.float32)
    schedule = scm.scm(scm.PAPER[4])
    fresh = jnp.asarray(rng.standard_normal((1, 4, 3, 3, 2), np.float32))

    def velocity(x, timestep, sigma):
        return (x - data) / sigma

    found = dpm_solver.solve(velocity, fresh[:, 0], schedule, fresh)
    np.testing.assert_allclose(found, data, atol=1e-5)


def test_the_last_steps_are_those_of_the_schedule():
    schedule = scm.scm(scm.PAPER[4])
    last = dpm_solver.last_steps(schedule, 2)
    for found, whole in zip(last, schedule, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, whole[2:])
    assert schedule.renew[-1] == 0 and schedule.timestep[0] == pytest.approx(997.5, abs=0.1)
