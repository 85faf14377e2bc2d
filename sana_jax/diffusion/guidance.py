"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6), on the velocity."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sana_jax.diffusion.dpm_solver import Velocity


def guide(
    both: Callable[[Array, Array], tuple[Array, Array]],
    conditional: Callable[[Array, Array], Array],
    scale: Float[Array, "B 1 1 1"] | float,
    interval: tuple[Array | float, Array | float] | None = None,
) -> Velocity:
    """Returns the guided velocity u + scale (c - u).

    `both` returns (u, c), the velocities without and with the prompt; `conditional` returns c
    alone. Guidance is on inside `interval`, low < sigma <= high; outside it only c is computed.
    """

    def guided(x, timestep):
        u, c = both(x, timestep)
        return u + scale * (c - u)

    if interval is None:
        return lambda x, timestep, sigma: guided(x, timestep)
    low, high = interval

    def velocity(x, timestep, sigma):
        inside = jnp.logical_and(low < sigma, sigma <= high)
        return lax.cond(inside, guided, conditional, x, timestep)

    return velocity
