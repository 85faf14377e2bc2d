"""The noise of a request: what drawing starts from and, for Sana-Sprint, what each step adds."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.pipeline.programs import draw_noise
from sana_jax.pipeline.request import Request


def noise_of(
    request: Request, shape: tuple[int, ...]
) -> tuple[Float[Array, "B h w c"], Float[Array, "B steps h w c"] | None]:
    """Returns the noise to start from, and the noise that each step adds, or None.

    All of an image's noise is of its own seed, unless the request brings it along. `shape`: of one
    image's latents.
    """
    given = None if request.latents is None else jnp.asarray(request.latents, jnp.float32)
    if not request.is_sprint:
        return (draw_noise(request.keys, shape) if given is None else given), None
    if given is None or given.ndim == 4:
        noise = draw_noise(request.keys, shape, len(request.schedule.sigma))
        noise = noise if given is None else noise.at[:, 0].set(given)
    else:
        noise = given
    # Step i adds what follows; the last step adds none, whatever stands there.
    return noise[:, 0], jnp.roll(noise, -1, axis=1)
