"""SCM, the few-step sampler of consistency models (arXiv 2410.11081), for SANA-Sprint.

At each of a few falling angles of TrigFlow the network points at the data, and the next state is
these data with new noise. In the flow's coordinates (trigflow.py), with s the time of an angle t:

    x0 = x - s v(x, s)        x <- (1 - s') x0 + s' z

This is the multistep rule of dpm_solver.py which keeps nothing of a state and adds noise.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax.diffusion.dpm_solver import Schedule
from sana_jax.diffusion.flow import NUM_TIMESTEPS
from sana_jax.diffusion.trigflow import flow_time

NUM_STEPS = 2  # unless told otherwise
MAX_ANGLE = 1.5708  # diffusers', which is pi/2, rounded up
# Angles by the number of steps (SANA-Sprint, arXiv 2503.09641, table 7).
PAPER = {
    1: (math.pi / 2, 0.0),
    2: (math.atan(400), 1.3, 0.0),
    4: (math.atan(400), 1.3, 1.1, 0.6, 0.0),
}
NAMES = "paper", "diffusers"


class BadAngles(ValueError):
    """Angles that are no schedule."""


def named_angles(name: str | None, num_steps: int) -> tuple[float, ...]:
    """Returns the num_steps + 1 angles of a schedule, falling to 0.

    "paper" has 1, 2 and 4 steps. "diffusers" has any number, evenly spaced but for 2: these differ
    from the paper's in the last digits of the first angle, and 4 steps in all between. None: the
    paper's where it has that number, else diffusers'. Raises BadAngles.
    """
    if name == "paper" and num_steps not in PAPER:
        known = ", ".join(map(str, PAPER))
        raise BadAngles(f"the paper has schedules of {known} steps, not {num_steps}")
    if name != "diffusers" and num_steps in PAPER:
        return PAPER[num_steps]
    if num_steps == 2:
        return MAX_ANGLE, 1.3, 0.0
    return tuple(map(float, np.linspace(MAX_ANGLE, 0, num_steps + 1)))


def check_angles(angles: Sequence[float]) -> None:
    """Raises BadAngles unless the angles fall, from pi/2 at most (rounded up), and end at 0."""
    if len(angles) < 2:
        raise BadAngles("it takes two angles or more, of which the last is 0")
    if not 0 < angles[0] <= MAX_ANGLE:
        raise BadAngles(f"{angles[0]:g} is not in 0 .. pi/2")
    for before, after in zip(angles, angles[1:], strict=False):
        if not after < before:
            raise BadAngles(f"{after:g} comes after {before:g}: angles fall")
    if angles[-1] != 0:
        raise BadAngles(f"the last is {angles[-1]:g} instead of 0")


def scm(angles: Sequence[float]) -> Schedule:
    """Returns the schedule of a network evaluation at every angle but the last one, 0.

    The timestep is the flow's, 0 .. 1000, as in all schedules.
    """
    time = flow_time(np.asarray(angles, np.float64))
    nothing = np.zeros(len(time) - 1)
    columns = NUM_TIMESTEPS * time[:-1], time[:-1], nothing, 1 - time[1:], nothing, time[1:]
    return Schedule(*(column.astype(np.float32) for column in columns))


def pure_noise(noise: Float[Array, "B h w c"], time: float) -> Float[Array, "B h w c"]:
    """Returns the state that text to image starts from at the flow's `time`, from normal noise.

    It is TrigFlow's of pure noise, at whatever angle: it has the spread that a state with data in
    it has, where the flow's `time * noise` would have less.
    """
    return noise * jnp.sqrt(time**2 + (1 - time) ** 2)
