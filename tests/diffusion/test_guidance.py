"""Guidance: the formula, its scale, the interval."""

import jax.numpy as jnp
import numpy as np

from sana_jax.diffusion.guidance import guide


def evaluators(calls):
    def both(x, timestep):
        calls.append("both")
        return x + timestep, 10 * x + timestep

    def conditional(x, timestep):
        calls.append("conditional")
        return 10 * x + timestep

    return both, conditional


x = jnp.array([1.0, 2.0])[:, None, None, None]


def test_formula():
    velocity = guide(*evaluators([]), 3.0)
    expected = x + 3 * (10 * x - x) + 7
    np.testing.assert_allclose(velocity(x, 7.0, 0.5), expected)


def test_scale_one_is_the_conditional_velocity():
    velocity = guide(*evaluators([]), 1.0)
    np.testing.assert_allclose(velocity(x, 0.0, 0.5), 10 * x)


def test_scale_of_each_image():
    scale = jnp.array([1.0, 2.0])[:, None, None, None]
    np.testing.assert_allclose(guide(*evaluators([]), scale)(x, 0.0, 0.5), x + scale * 9 * x)


def test_interval_has_its_upper_end():
    """Euler starts at a sigma of exactly 1, which (0, 1) is to guide."""
    velocity = guide(*evaluators([]), 3.0, interval=(0.25, 0.75))
    for sigma, factor in ((0.2, 10), (0.25, 10), (0.5, 28), (0.75, 28), (0.9, 10)):
        np.testing.assert_allclose(velocity(x, 0.0, jnp.float32(sigma)), factor * x)
