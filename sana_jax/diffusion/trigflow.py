"""TrigFlow (sCM, arXiv 2410.11081, section 4), and a flow's network in its coordinates.

The state at the angle t, 0 (data) .. pi/2 (noise), and its velocity, for data x0 of the standard
deviation SIGMA_DATA and noise z:

    x_t = cos(t) x0 + sin(t) SIGMA_DATA z        dx/dt = cos(t) SIGMA_DATA z - sin(t) x0

Divided by (cos(t) + sin(t)) SIGMA_DATA this is a flow's state, (1 - s) data + s noise, of data with
deviation 1 at the time s. So a flow's network gives TrigFlow's velocity without any training
(SANA-Sprint, arXiv 2503.09641, section 3.1), and what a TrigFlow sampler does, the flow's own
coordinates can do.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SIGMA_DATA = 0.5  # of the released networks' training; drawing divides it out

# (state, time in 0 .. 1, guidance scale or None) -> velocity noise - data
Network = Callable[[Array, Array, Any], Array]


def flow_time(angle):
    """Returns the flow's time of an angle, 0 .. 1: of numbers, or of an array of NumPy or JAX."""
    library = jnp if isinstance(angle, Array) else np
    sin, cos = library.sin(angle), library.cos(angle)
    return sin / (cos + sin)


def velocity(
    network: Network,
    x: Float[Array, "B h w c"],
    angle: Float[Array, " #B"],
    guidance: Any = None,
) -> Float[Array, "B h w c"]:
    """Returns F, TrigFlow's velocity divided by SIGMA_DATA, from a flow's network.

    It may be differentiated in `x` and `angle`, forward too, as far as the network may.

    Args:
      network: gives the flow's velocity.
      x: the state x_t divided by SIGMA_DATA.
      angle: t, one for each row, or one for all.
      guidance: goes to the network as it is.
    """
    rows = angle[:, None, None, None]
    sin, cos = jnp.sin(rows), jnp.cos(rows)
    v = network(x / (cos + sin), flow_time(angle), guidance)
    return ((cos - sin) * x + v) / (cos + sin)
