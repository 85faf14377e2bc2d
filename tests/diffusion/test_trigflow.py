"""TrigFlow's coordinates of a flow, against diffusers' formulas, and differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax.diffusion import trigflow
from tests import toy

ANGLES = np.array([1.5708, 1.3, 0.6, 0.01], np.float32)


def network(x, time, guidance):
    """A velocity that depends on everything; works in torch and in jax."""
    rows = time.reshape(-1, 1, 1, 1)
    return 0.7 * x + (x * x + 1) ** -0.5 * rows - guidance * rows**2


def state(rows: int = len(ANGLES)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, 3, 4, 2), np.float32)


def test_velocity_is_that_of_diffusers():
    """As SanaSprintPipeline computes it, before it multiplies by sigma_data."""
    x, angle = torch.tensor(state()), torch.tensor(ANGLES)
    time = torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))
    s = time.view(-1, 1, 1, 1)
    spread = torch.sqrt(s**2 + (1 - s) ** 2)
    v = network(x * spread, time, 0.45)
    theirs = ((1 - 2 * s) * (x * spread) + (1 - 2 * s + 2 * s**2) * v) / spread
    ours = trigflow.velocity(network, jnp.asarray(state()), jnp.asarray(ANGLES), 0.45)
    toy.assert_close(ours, theirs.numpy(), 1e-6)


def test_the_flow_of_known_data_is_their_trigflow():
    """From v = noise - data comes dx/dt = cos(t) noise - sin(t) data, without loss."""
    data, noise = state(), np.random.default_rng(1).standard_normal((4, 3, 4, 2))
    angle = jnp.asarray(ANGLES)
    cos, sin = np.cos(ANGLES)[:, None, None, None], np.sin(ANGLES)[:, None, None, None]
    x = jnp.asarray(cos * data + sin * noise)
    found = trigflow.velocity(lambda *_: jnp.asarray(noise - data), x, angle)
    np.testing.assert_allclose(found, cos * noise - sin * data, rtol=1e-5, atol=1e-5)


def test_one_angle_serves_all_rows():
    x = jnp.asarray(state())
    one = trigflow.velocity(network, x, jnp.full(1, 0.8), 1.0)
    np.testing.assert_array_equal(one, trigflow.velocity(network, x, jnp.full(4, 0.8), 1.0))


def test_forward_derivative_is_that_of_finite_differences():
    """In float64, along the path of the loss: both the state and the angle move."""
    with jax.enable_x64(True):
        x, angle = jnp.asarray(state(), jnp.float64), jnp.asarray(ANGLES, jnp.float64)
        move = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape)), jnp.cos(angle)

        def f(x, angle):
            return trigflow.velocity(network, x, angle, 0.45)

        step = 1e-6
        value, found = jax.jit(lambda: jax.jvp(f, (x, angle), move))()
        ahead, behind = (f(x + h * move[0], angle + h * move[1]) for h in (step, -step))
        np.testing.assert_allclose(value, f(x, angle), rtol=1e-12)
        np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("angle, time", [(0.0, 0.0), (np.pi / 4, 0.5), (np.pi / 2, 1.0)])
def test_time_runs_from_data_to_noise(angle, time):
    assert trigflow.flow_time(angle) == pytest.approx(time)
    assert float(trigflow.flow_time(jnp.asarray(angle))) == pytest.approx(time)
