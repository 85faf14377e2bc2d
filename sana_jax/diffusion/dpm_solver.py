"""Flow-DPM-Solver, flow-Euler and SCM (scm.py) as one linear multistep rule under one scan.

With x0 = x - sigma v, the data at which a velocity points, and x0' from the step before:

    x <- keep x + move x0 + correct (x0 - x0') + renew z

Only SCM adds noise z. DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2), for
alpha = 1 - sigma and lambda = ln(alpha / sigma), from sigma_s to sigma_t with
h = lambda_t - lambda_s:

    keep = sigma_t / sigma_s     move = alpha_t (1 - exp(-h))     correct = move h / (2 h_previous)

The first and the last step are first order (correct = 0); the last step, to sigma 0, gives x0.
A first-order step on a flow is an Euler step: alpha_t (1 - exp(-h)) = 1 - sigma_t / sigma_s.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sana_jax.diffusion.flow import NUM_TIMESTEPS, dpm_sigmas, euler_sigmas


class Schedule(NamedTuple):
    """The coefficients of all steps, (num_steps,) each, in float32."""

    timestep: Array | np.ndarray  # the input of the network
    sigma: Array | np.ndarray  # the noise level of the state
    keep: Array | np.ndarray
    move: Array | np.ndarray
    correct: Array | np.ndarray
    renew: Array | np.ndarray | None = None  # None: no step adds noise


def _schedule(timestep: np.ndarray, sigma: np.ndarray, order: int) -> Schedule:
    # Rounded to float32, as in the reference, before anything is computed from them.
    sigma = sigma.astype(np.float32).astype(np.float64)
    keep = sigma[1:] / sigma[:-1]
    move = 1 - keep
    correct = np.zeros_like(move)
    if order == 2:
        with np.errstate(divide="ignore"):
            h = np.diff(np.log((1 - sigma) / sigma))  # infinite at the last step, to sigma 0
        correct[1:-1] = move[1:-1] * h[1:-1] / (2 * h[:-2])
    return Schedule(*(a.astype(np.float32) for a in (timestep, sigma[:-1], keep, move, correct)))


def flow_dpm_solver(num_steps: int, shift: float) -> Schedule:
    """Returns the schedule of Flow-DPM-Solver (SANA, arXiv 2410.10629, section 3.3).

    One network evaluation a step. The network gets the timestep truncated to an integer, as in its
    training; the solver uses the exact noise level.
    """
    sigma = dpm_sigmas(num_steps, shift)
    return _schedule(np.trunc(sigma[:-1] * NUM_TIMESTEPS), sigma, order=2)


def flow_euler(num_steps: int, shift: float) -> Schedule:
    """Returns Euler steps on diffusers' flow-match grid; the network gets the exact timestep."""
    sigma = euler_sigmas(num_steps, shift)
    timestep = sigma[:-1].astype(np.float32) * NUM_TIMESTEPS
    return _schedule(timestep, sigma, order=1)


def last_steps(schedule: Schedule, count: int) -> Schedule:
    """Returns the last `count` steps. The first of them is of first order: none goes before it."""
    rest = jax.tree.map(lambda column: column[-count:], schedule)
    return rest._replace(correct=np.append(np.float32(0), rest.correct[1:]))


SAMPLERS = {"flow_dpm_solver": flow_dpm_solver, "flow_euler": flow_euler}

# (state, timestep, sigma) -> velocity; timestep and sigma are scalars.
Velocity = Callable[[Array, Array, Array], Array]


def step(
    velocity: Velocity,
    carry: tuple[Array, Array],
    row: Schedule,
    fresh: Float[Array, "B h w c"] | None = None,
) -> tuple[Array, Array]:
    """Takes one step. The carry is (state, x0 of the step before), `row` its coefficients.

    `fresh`: the noise z that it adds, if the schedule adds noise.
    """
    x, previous = carry
    x0 = x - row.sigma * velocity(x, row.timestep, row.sigma)
    x = row.keep * x + row.move * x0 + row.correct * (x0 - previous)
    return (x if fresh is None else x + row.renew * fresh), x0


def solve(
    velocity: Velocity,
    noise: Float[Array, "B h w c"],
    schedule: Schedule,
    fresh: Float[Array, "B steps h w c"] | None = None,
) -> Float[Array, "B h w c"]:
    """Runs all steps from noise to latents under one lax.scan; the state stays float32.

    `fresh`: of each step the noise z that it adds, if the schedule adds noise.
    """
    noise = noise.astype(jnp.float32)
    rows = jax.tree.map(jnp.asarray, schedule), fresh if fresh is None else fresh.swapaxes(0, 1)
    carry = noise, jnp.zeros_like(noise)
    (x, _), _ = lax.scan(lambda carry, row: (step(velocity, carry, *row), None), carry, rows)
    return x
