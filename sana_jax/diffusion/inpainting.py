"""Inpainting: the sampler as it is, told the true velocity wherever the data are known.

Where a latent is kept, the state on the flow is x = (1 - sigma) data + sigma noise, and its
velocity is noise - data = (x - data) / sigma. It replaces the network's there, before the solver
sees it. The solvers are exact on such a straight flow, at any order: the kept part is the picture
at each step's own noise level, always with the noise that it started from, and every x0 that the
multistep rule remembers is the picture's. Pasting the noised picture into the state after each
step, as latent blending does (arXiv 2206.02779), gives the same latents, but has to carry the noise
and the levels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sana_jax.diffusion.dpm_solver import Velocity


class Kept(NamedTuple):
    """What is known of the data, and where it is not to be used."""

    data: Float[Array, "B h w c"]
    redrawn: Bool[Array, "B h w 1"]


def keep(velocity: Velocity, kept: Kept) -> Velocity:
    """Returns `velocity` where latents are redrawn; elsewhere the one that leads to the data."""

    def towards_data(x, timestep, sigma):
        return jnp.where(kept.redrawn, velocity(x, timestep, sigma), (x - kept.data) / sigma)

    return towards_data
