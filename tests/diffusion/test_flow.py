"""Noise levels: their ends, their order, and what a shift does to them."""

import numpy as np
import pytest

from sana_jax.diffusion.flow import dpm_sigmas, euler_sigmas, shift_sigma


def test_shift_keeps_the_ends():
    assert shift_sigma(0.0, 3.0) == 0 and shift_sigma(1.0, 3.0) == 1
    assert shift_sigma(0.5, 3.0) == pytest.approx(0.75)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sigmas", [dpm_sigmas, euler_sigmas])
def test_levels_fall_from_noise_to_data(sigmas, shift):
    found = sigmas(20, shift)
    assert found.shape == (21,) and found.dtype == np.float64
    assert (np.diff(found) < 0).all() and found[-1] == 0
    assert found[0] == pytest.approx(1, abs=2e-3)


def test_a_shift_moves_levels_towards_noise():
    assert (dpm_sigmas(20, 3.0)[1:-1] > dpm_sigmas(20, 1.0)[1:-1]).all()
