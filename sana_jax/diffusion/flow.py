"""Rectified flow: x_sigma = (1 - sigma) data + sigma noise, velocity = noise - data.

sigma runs from 1 (noise) to 0 (data). The network's input is the timestep 1000 sigma.
Lipman et al., arXiv 2210.02747; the shift is that of Esser et al., arXiv 2403.03206, eq. 23.
"""

import numpy as np

NUM_TIMESTEPS = 1000  # of the released networks' training
SHIFTS = 1e-3, 1e3  # the least and the most; the released networks have 1 to 6


def shift_sigma(sigma, shift: float):
    """Moves noise levels in [0, 1] towards noise for shift > 1; 0 and 1 stay where they are."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dpm_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """Returns the num_steps + 1 noise levels of Flow-DPM-Solver in float64, falling to 0."""
    sigma = 1 - np.linspace(1, 1 / NUM_TIMESTEPS, num_steps + 1)
    return np.append(shift_sigma(sigma, shift)[:0:-1], 0.0)


def euler_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """Returns the num_steps + 1 noise levels of flow-Euler in float64, falling from 1 to 0.

    The smallest level before 0 is shifted twice, as in diffusers' scheduler, which shifts its
    table when it makes the table and again when it chooses steps from it.
    """
    lowest = shift_sigma(1 / NUM_TIMESTEPS, shift)
    return np.append(shift_sigma(np.linspace(1, lowest, num_steps), shift), 0.0)
