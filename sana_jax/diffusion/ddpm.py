"""DDPM (Ho et al., arXiv 2006.11239) seen as the flow that it is, to compare the two objectives.

A network of DDPM predicts the noise of a variance-preserving state at an integer timestep t:

    x_vp = alpha_t data + sigma_t noise        alpha_t^2 + sigma_t^2 = 1

Divided by alpha_t + sigma_t this is a flow's state, x = (1 - sigma) data + sigma noise, at the
level sigma = sigma_t / (alpha_t + sigma_t). With x = data + sigma (noise - data), the noise e gives
the velocity

    v = e - data = (e - x) / (1 - sigma)

So a network of DDPM behind `velocity` is drawn from, guided and measured as a flow's. Its loss,
|e - noise|^2 at uniform t, is (1 - sigma)^2 |v - (noise - data)|^2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax.diffusion.flow import NUM_TIMESTEPS


def _levels() -> tuple[np.ndarray, np.ndarray]:
    """Returns alpha_t + sigma_t, and the flow's level, of every t; in float64, rising."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, NUM_TIMESTEPS))  # DDPM's linear betas
    alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    return alpha + sigma, sigma / (alpha + sigma)


SCALES, SIGMAS = _levels()  # SIGMAS run from 0.0099 to 0.9937


def draw_level(key: Array) -> Float[Array, ""]:
    """Draws the flow's level of a uniform timestep."""
    return jnp.asarray(SIGMAS, jnp.float32)[jax.random.randint(key, (), 0, NUM_TIMESTEPS)]


def velocity(
    noise_of: Callable[[Array, Array], Array],
    x: Float[Array, "B h w c"],
    sigma: Float[Array, " #B"],
) -> Float[Array, "B h w c"]:
    """Returns the velocity of a flow's state, in float32, from a network of DDPM.

    Args:
      noise_of: (x_vp, timestep) -> the predicted noise; timesteps are whole numbers, float32.
      x: the state at the flow's level `sigma`.
      sigma: the level. The timestep is the nearest one of DDPM, whose levels end before 0 and 1:
        beyond them the state counts as of the last level. A sampler's first step begins there:
        its velocity is multiplied by a level that is up to 0.6 % too large.
    """
    levels = jnp.asarray(SIGMAS, jnp.float32)
    sigma = jnp.clip(sigma, levels[0], levels[-1])
    timestep = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, sigma)
    scale = jnp.asarray(SCALES, jnp.float32)[timestep]
    x = x.astype(jnp.float32)
    noise = noise_of(x * _rows(scale), timestep.astype(jnp.float32)).astype(jnp.float32)
    return (noise - x) / (1 - _rows(sigma))


def _rows(values: Float[Array, " #B"]) -> Float[Array, "#B 1 1 1"]:
    return values[:, None, None, None]
