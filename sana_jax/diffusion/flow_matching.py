"""Flow matching: the random draws of a training step, and its loss.

    x_sigma = (1 - sigma) data + sigma noise        v = noise - data        mean |v_net - v|^2

SANA, arXiv 2410.10629, section 3.2; the densities are those of Esser et al., arXiv 2403.03206,
section 3.1. A row's draws depend only on the key and on the row's place in the batch: draw for the
whole batch, then split it into microbatches.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sana_jax.diffusion import ddpm
from sana_jax.diffusion.flow import NUM_TIMESTEPS, shift_sigma
from sana_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """The distribution and weights of noise levels, by keys of DENSITIES and WEIGHTINGS.

    Raises UserError for an unknown name or a number out of range.
    """

    density: str = "logit_normal"  # of u in [0, 1], before the shift
    mean: float = 0.0  # of the logit of u
    std: float = 1.0
    mode_scale: float = 1.29  # of "mode", monotonic in -1 .. 2 / (pi - 2); 0 is uniform
    shift: float = 3.0  # towards noise
    grid: bool = False  # the reference's 1000 levels and integer timesteps, not a continuum
    weighting: str = "none"

    def __post_init__(self):
        for kind, table, name in (
            ("density", DENSITIES, self.density),
            ("weighting", WEIGHTINGS, self.weighting),
        ):
            if name not in table:
                raise UserError(f"{kind} {name!r} is unknown; there are {', '.join(table)}")
        for name in "std", "shift":
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)}: give a positive number")
        if not -1 <= self.mode_scale <= 2 / (np.pi - 2):
            raise UserError(f"mode_scale={self.mode_scale}: give -1 to 2 / (pi - 2)")


def _logit_normal(key: Array, config: NoiseConfig) -> Float[Array, ""]:
    return jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key))


def _mode(key: Array, config: NoiseConfig) -> Float[Array, ""]:
    u = jax.random.uniform(key)
    return 1 - u - config.mode_scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


def _uniform(key: Array, config: NoiseConfig) -> Float[Array, ""]:
    return jax.random.uniform(key)


def _ddpm(key: Array, config: NoiseConfig) -> Float[Array, ""]:
    return ddpm.draw_level(key)


# Name -> a function that draws one u (2403.03206, section 3.1: equations 19 and 20; ddpm.py).
DENSITIES = {"logit_normal": _logit_normal, "mode": _mode, "uniform": _uniform, "ddpm": _ddpm}

# Name -> the weight of a row's error as a function of its noise level.
WEIGHTINGS: dict[str, Callable[[Float[Array, " B"]], Float[Array, " B"]]] = {
    "none": jnp.ones_like,  # SANA's
    "cosmap": lambda sigma: 2 / (jnp.pi * (1 - 2 * sigma + 2 * sigma**2)),  # 2403.03206, eq. 21
    "ddpm": lambda sigma: (1 - sigma) ** 2,  # the error of the noise: see ddpm.py
}
DDPM = NoiseConfig(density="ddpm", shift=1.0, weighting="ddpm")


def reference_grid(shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the reference's 1000 noise levels, and the network's integer timestep at each.

    In float64 and in the reference's order of operations: a different rounding can truncate a
    timestep to one less.
    """
    sigma = shift_sigma(1 - np.linspace(1, 1 / NUM_TIMESTEPS, NUM_TIMESTEPS), shift)
    return sigma, np.trunc(sigma * NUM_TIMESTEPS)


def row_keys(key: Array, rows: int) -> Array:
    """Returns a key for each row, which does not depend on the number of rows."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))


def draw_levels(
    key: Array, rows: int, config: NoiseConfig
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Draws the noise level of each row, in [0, 1], and returns the network's timesteps too."""
    u = jax.vmap(lambda k: DENSITIES[config.density](k, config))(row_keys(key, rows))
    if not config.grid:
        sigma = shift_sigma(u, config.shift)
        return sigma, NUM_TIMESTEPS * sigma
    # The reference draws an index into its grid.
    sigma, timestep = (jnp.asarray(x, jnp.float32) for x in reference_grid(config.shift))
    index = jnp.clip((NUM_TIMESTEPS * u).astype(jnp.int32), 0, NUM_TIMESTEPS - 1)
    return sigma[index], timestep[index]


def draw_noise(
    key: Array, latents: Float[Array | jax.ShapeDtypeStruct, "B h w c"]
) -> Float[Array, "B h w c"]:
    """Draws standard normal noise of the latents' shape, in float32."""
    keys = row_keys(key, latents.shape[0])
    return jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(keys)


def interpolate(
    data: Float[Array, "B h w c"], noise: Float[Array, "B h w c"], sigma: Float[Array, " B"]
) -> Float[Array, "B h w c"]:
    """Returns x_sigma = (1 - sigma) data + sigma noise, in float32."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * data.astype(jnp.float32) + sigma * noise


def velocity_of(
    data: Float[Array, "B h w c"], noise: Float[Array, "B h w c"]
) -> Float[Array, "B h w c"]:
    """Returns noise - data in float32, the derivative of x_sigma by sigma."""
    return noise.astype(jnp.float32) - data.astype(jnp.float32)


def row_errors(
    velocity: Float[Array, "B h w c"], target: Float[Array, "B h w c"]
) -> Float[Array, " B"]:
    """Returns the mean squared error of each row's velocity, in float32."""
    difference = velocity.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.square(difference).mean(axis=(1, 2, 3))


def flow_loss(
    errors: Float[Array, " B"], sigma: Float[Array, " B"], config: NoiseConfig
) -> Float[Array, ""]:
    """Returns the mean over rows of `row_errors`, weighted by noise level."""
    return jnp.mean(WEIGHTINGS[config.weighting](sigma) * errors)


def draw_dropped(key: Array, rows: int, probability: float) -> Bool[Array, " B"]:
    """Draws the rows that lose their caption, each with `probability`."""
    return jax.vmap(lambda k: jax.random.bernoulli(k, probability))(row_keys(key, rows))


def drop_captions(
    dropped: Bool[Array, " B"],
    embeddings: Float[Array, "B L T"],
    mask: Bool[Array, "B L"],
    null_embedding: Float[Array, "L T"],
    null_mask: Bool[Array, " L"],
    keep_mask: bool = False,
) -> tuple[Float[Array, "B L T"], Bool[Array, "B L"]]:
    """Replaces the captions of `dropped` rows by the empty one, for classifier-free guidance.

    A dropped row gets the empty prompt's own mask, as in diffusers' sampling; with `keep_mask` it
    keeps the caption's, as in NVlabs' code, and sees the empty prompt's padding, so that
    `null_embedding` has to have rows there (Ho and Salimans, arXiv 2207.12598, section 3.2).
    """
    null_embedding = null_embedding.astype(embeddings.dtype)
    embeddings = jnp.where(dropped[:, None, None], null_embedding, embeddings)
    return embeddings, mask if keep_mask else jnp.where(dropped[:, None], null_mask, mask)
