"""Against formulas in float64, quantiles of the densities, and diffusers' densities and weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from scipy.special import ndtri

from sana_jax.diffusion.flow_matching import (
    DENSITIES,
    WEIGHTINGS,
    NoiseConfig,
    draw_dropped,
    draw_levels,
    draw_noise,
    drop_captions,
    flow_loss,
    interpolate,
    reference_grid,
    row_errors,
    velocity_of,
)
from sana_jax.runtime.errors import UserError
from sana_jax.training.microbatches import mean_over_microbatches

ROWS = 20_000
QUANTILES = np.linspace(0.05, 0.95, 19)
KEY = jax.random.key(3)


def shifted(u, shift):
    return shift * u / (1 + (shift - 1) * u)


def assert_quantiles(found, expected_quantile):
    """Within four standard errors of the share of draws that lie below each quantile."""
    share = [(found <= expected_quantile(q)).mean() for q in QUANTILES]
    error = np.sqrt(QUANTILES * (1 - QUANTILES) / len(found))
    assert (abs(share - QUANTILES) < 4 * error).all(), share


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (-0.5, 1.4, 3.0)])
def test_logit_normal(mean, std, shift):
    sigma, timestep = draw_levels(KEY, ROWS, NoiseConfig(mean=mean, std=std, shift=shift))
    assert_quantiles(
        np.asarray(sigma),
        lambda q: shifted(1 / (1 + math.exp(-(mean + std * ndtri(q)))), shift),
    )
    np.testing.assert_array_equal(timestep, 1000 * sigma)


def test_uniform():
    sigma, _ = draw_levels(KEY, ROWS, NoiseConfig(density="uniform", shift=4.0))
    assert_quantiles(np.asarray(sigma), lambda q: shifted(q, 4.0))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29])
def test_mode(scale):
    """u falls as its uniform number rises (2403.03206, eq. 20)."""
    sigma, _ = draw_levels(KEY, ROWS, NoiseConfig(density="mode", mode_scale=scale, shift=1.0))

    def quantile(q):
        q = 1 - q
        return 1 - q - scale * (math.cos(math.pi / 2 * q) ** 2 - 1 + q)

    assert_quantiles(np.asarray(sigma), quantile)


# DDPM's is no density of diffusers': tests/diffusion/test_ddpm.py.
@pytest.mark.parametrize("density", [name for name in DENSITIES if name != "ddpm"])
def test_density_is_that_of_diffusers(density):
    theirs = compute_density_for_timestep_sampling(
        density, ROWS, -0.4, 1.2, 1.29, generator=torch.Generator().manual_seed(0)
    )
    config = NoiseConfig(density=density, mean=-0.4, std=1.2, shift=1.0)
    found, _ = draw_levels(KEY, ROWS, config)
    a, b = np.quantile(found, QUANTILES), np.quantile(theirs.numpy(), QUANTILES)
    np.testing.assert_allclose(a, b, atol=0.02)  # four standard errors of a difference of two


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
def test_reference_grid(shift):
    """sigma_i = i / 1000, shifted; timestep = floor(1000 sigma) of the same number in float64."""
    sigma, timestep = reference_grid(shift)
    assert sigma.shape == (1000,) and sigma[0] == 0 and (np.diff(sigma) > 0).all()
    np.testing.assert_allclose(
        sigma, shifted(np.arange(1000) / 1000, shift), rtol=1e-13, atol=1e-16
    )
    betas = np.linspace(1, 0.001, 1000)
    theirs = shift * (1 - betas) / (1 + (shift - 1) * (1 - betas)) * 1000
    # torch.tensor(float64 array, dtype=int64) is what the reference does with it
    np.testing.assert_array_equal(timestep, torch.tensor(theirs, dtype=torch.int64).numpy())


def test_reference_values():
    """By hand: i = 500 at shift 3 is sigma 0.75; the last level at shift 3 is 2.997 / 2.998."""
    sigma, timestep = reference_grid(3.0)
    np.testing.assert_allclose(sigma[[1, 250, 500, 999]], [3 / 1002, 0.5, 0.75, 2.997 / 2.998])
    assert timestep[[1, 251, 501, 999]].tolist() == [2, 501, 750, 999]


def test_grid_levels():
    """The index is int(1000 u) of the same draw; both figures are read from the table."""
    config = NoiseConfig(shift=3.0, grid=True)
    sigma, timestep = draw_levels(KEY, 500, config)
    continuous, _ = draw_levels(KEY, 500, NoiseConfig(shift=1.0))
    index = (1000 * np.asarray(continuous)).astype(int)
    levels, times = reference_grid(3.0)
    np.testing.assert_array_equal(sigma, np.float32(levels[index]))
    np.testing.assert_array_equal(timestep, times[index])
    # A u that rounds to one stays inside the table.
    sigma, timestep = draw_levels(KEY, 4, NoiseConfig(mean=100.0, grid=True))
    np.testing.assert_array_equal(timestep, 999.0)


def test_rows_do_not_depend_on_the_batch():
    latents = jnp.zeros((7, 4, 3, 2))
    noise = draw_noise(KEY, latents)
    np.testing.assert_array_equal(noise[:3], draw_noise(KEY, latents[:3]))
    for of_seven, of_three in zip(
        *(draw_levels(KEY, n, NoiseConfig()) for n in (7, 3)), strict=True
    ):
        np.testing.assert_array_equal(of_seven[:3], of_three)
    assert len(np.unique(noise)) == noise.size and noise.dtype == jnp.float32


def test_noise_is_standard_normal():
    noise = np.asarray(draw_noise(KEY, jnp.zeros((50, 4, 5, 20), jnp.bfloat16))).ravel()
    assert_quantiles(noise, ndtri)


def problem(dtype=jnp.float32):
    data, noise, velocity = jax.random.normal(jax.random.key(0), (3, 8, 4, 3, 2))
    sigma, _ = draw_levels(KEY, 8, NoiseConfig())
    return data.astype(dtype), noise, velocity.astype(dtype), sigma


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
def test_loss_is_that_of_the_formula(dtype, weighting):
    data, noise, velocity, sigma = problem(dtype)
    x, n, v, s = (np.asarray(a.astype(jnp.float32), np.float64) for a in problem(dtype))
    found = interpolate(data, noise, sigma)
    s4 = s[:, None, None, None]
    np.testing.assert_allclose(found, (1 - s4) * x + s4 * n, rtol=1e-6, atol=1e-6)
    weight = compute_loss_weighting_for_sd3(weighting, torch.tensor(s)).numpy()
    if weighting == "ddpm":  # which diffusers does not have
        weight = (1 - s) ** 2
    wanted = (weight[:, None, None, None] * (v - (n - x)) ** 2).mean()
    errors = row_errors(velocity, velocity_of(data, noise))
    loss = flow_loss(errors, sigma, NoiseConfig(weighting=weighting))
    assert found.dtype == loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_the_exact_velocity_leads_to_the_data():
    data, noise, _, sigma = problem()
    x = interpolate(data, noise, sigma)
    back = x - sigma[:, None, None, None] * velocity_of(data, noise)
    np.testing.assert_allclose(back, data, atol=1e-6)


def test_accumulated_loss_is_that_of_the_batch():
    data, noise, velocity, sigma = problem()

    def loss(rows):
        errors = row_errors(rows["velocity"], velocity_of(rows["data"], rows["noise"]))
        return flow_loss(errors, rows["sigma"], NoiseConfig(weighting="cosmap"))

    batch = dict(data=data, noise=noise, velocity=velocity, sigma=sigma)
    np.testing.assert_allclose(mean_over_microbatches(loss, batch, 4), loss(batch), rtol=1e-6)


def test_drop_captions():
    rows, length, width = 4000, 5, 2
    embeddings = jax.random.normal(jax.random.key(1), (rows, length, width))
    mask = jnp.arange(length) < jnp.arange(rows)[:, None] % length + 1
    null, null_mask = jnp.full((length, width), 9.0), jnp.arange(length) < 2
    dropped = draw_dropped(KEY, rows, 0.1)
    assert abs(dropped.mean() - 0.1) < 4 * math.sqrt(0.09 / rows)
    np.testing.assert_array_equal(dropped[:100], draw_dropped(KEY, 100, 0.1))
    assert draw_dropped(KEY, rows, 1.0).all() and not draw_dropped(KEY, rows, 0.0).any()
    found, found_mask = drop_captions(dropped, embeddings, mask, null, null_mask)
    np.testing.assert_array_equal((found == 9).all(axis=(1, 2)), dropped)
    np.testing.assert_array_equal(found[~dropped], embeddings[~dropped])
    np.testing.assert_array_equal(found_mask, np.where(dropped[:, None], null_mask, mask))
    same, kept = drop_captions(dropped, embeddings, mask, null, null_mask, keep_mask=True)
    np.testing.assert_array_equal(same, found)
    np.testing.assert_array_equal(kept, mask)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(density="lognormal"), "density 'lognormal' is unknown; there are logit_normal, mode"),
        (dict(weighting="snr"), "weighting 'snr' is unknown; there are none, cosmap"),
        (dict(shift=0.0), "shift=0.0: give a positive number"),
        (dict(std=float("nan")), "std=nan"),
        (dict(mode_scale=2.0), "mode_scale=2.0"),
    ],
)
def test_bad_figures(change, message):
    with pytest.raises(UserError, match=message):
        NoiseConfig(**change)
