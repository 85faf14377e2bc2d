"""The loss of continuous-time consistency distillation (sCM, arXiv 2410.11081, algorithm 1).

A state x_t of TrigFlow (diffusion/trigflow.py) and the student's velocity F are divided by
SIGMA_DATA, s below, throughout. With the teacher's velocity v = (dx/dt) / s, the student without
gradients F', and a warm-up r from 0 to 1, the tangent of the student's prediction of the data is

    g = s (-cos^2(t) (F' - v) - r (cos(t) sin(t) x_t + cos(t) sin(t) dF'/dt))
    g <- g / (|g| + c)                                  |g| over a sample's values, c = 0.1

where dF'/dt is along the teacher's path: dx = v dt. The loss of a sample whose learned uncertainty
is log_variance is the mean over its values of

    exp(-log_variance) / (s tan(t)) (F - F' - g)^2 + log_variance
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.diffusion.flow_matching import row_keys
from sana_jax.diffusion.trigflow import SIGMA_DATA

Latents = Float[Array, "B h w c"]
Student = Callable[[Latents, Float[Array, " B"]], Latents]  # (x_t, t) -> F


def draw_angles(key: Array, rows: int, mean: float, std: float) -> Float[Array, " B"]:
    """Draws angles with log-normal tangents: arctan(exp(mean + std n) / SIGMA_DATA), n normal."""
    normal = jax.vmap(jax.random.normal)(row_keys(key, rows))
    return jnp.arctan(jnp.exp(mean + std * normal) / SIGMA_DATA)


def state_at(angle: Float[Array, " B"], data: Latents, noise: Latents) -> Latents:
    """Returns x_t, divided by SIGMA_DATA, of data with deviation 1."""
    angle = angle[:, None, None, None]
    return jnp.cos(angle) * data + jnp.sin(angle) * noise


def data_of(angle: Float[Array, " B"], x: Latents, velocity: Latents) -> Latents:
    """Returns the data that a velocity divided by SIGMA_DATA points at from x_t."""
    angle = angle[:, None, None, None]
    return jnp.cos(angle) * x - jnp.sin(angle) * velocity


def tangent(
    student: Student,
    x: Latents,
    angle: Float[Array, " B"],
    velocity: Latents,
    warmup: Float[Array, ""] | float = 1.0,
    constant: float = 0.1,
) -> Latents:
    """Returns g, normalised.

    Args:
      student: the student with fixed parameters, which must have a forward derivative.
      x, angle: x_t and t.
      velocity: the teacher's velocity v there.
      warmup: r.
      constant: c.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    moves = (cos * sin)[:, None, None, None] * velocity, cos * sin
    value, moved = jax.jvp(student, (x, angle), moves)
    cos, sin = (rows[:, None, None, None] for rows in (cos, sin))
    g = -(cos**2) * (value - velocity) - warmup * (cos * sin * x + moved)
    g = SIGMA_DATA * g
    norm = jnp.sqrt(jnp.sum(g**2, axis=(1, 2, 3), keepdims=True))
    return g / (norm + constant)


def consistency_loss(
    value: Latents,
    g: Latents,
    angle: Float[Array, " B"],
    log_variance: Float[Array, " B"],
) -> Float[Array, ""]:
    """Returns the mean loss of a batch from the student's F, with gradients, and g, without."""
    squares = jnp.mean((value - jax.lax.stop_gradient(value + g)) ** 2, axis=(1, 2, 3))
    weight = jnp.exp(-log_variance) / (SIGMA_DATA * jnp.tan(angle))
    return jnp.mean(weight * squares + log_variance)
