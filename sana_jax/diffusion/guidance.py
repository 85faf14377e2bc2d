"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598, eq. 6), on the velocity.

The unconditional and the conditional half of one image sit side by side in the batch,
[u_0, c_0, u_1, c_1, ...], so that splitting the batch over devices never parts them.
"""

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jaxtyping import Array, Float

from sana_jax.diffusion.dpm_solver import Velocity


def guide(
    both: Callable[[Array, Array], Array],
    conditional: Callable[[Array, Array], Array],
    scale: Float[Array, "B 1 1 1"] | float,
    interval: tuple[Array | float, Array | float] | None = None,
) -> Velocity:
    """The velocity u + scale (c - u).

    `both` evaluates 2B states in the order above, `conditional` B of them. Inside the open
    `interval` (low, high) of sigma guidance is on; outside only the conditional half is computed.
    """

    def guided(x, timestep):
        u, c = rearrange(
            both(repeat(x, "b ... -> (b two) ...", two=2), timestep),
            "(b two) ... -> two b ...",
            two=2,
        )
        return u + scale * (c - u)

    if interval is None:
        return lambda x, timestep, sigma: guided(x, timestep)
    low, high = interval

    def velocity(x, timestep, sigma):
        inside = jnp.logical_and(low < sigma, sigma < high)
        return lax.cond(inside, guided, conditional, x, timestep)

    return velocity
