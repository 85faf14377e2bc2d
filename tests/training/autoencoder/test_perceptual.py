"""The table of perceptual losses, and the stand-in against its definition in NumPy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder import perceptual


def images(seed=0, shape=(3, 32, 48, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def reference(x, y, levels=4):
    """Computes the bands of each picture by itself, with SciPy's correlation."""
    x, y, total = x.astype(np.float64), y.astype(np.float64), 0
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    for _ in range(levels):
        bands = []
        for z in (x, y):
            low = correlate1d(correlate1d(z, kernel, 1, mode="nearest"), kernel, 2, mode="nearest")
            bands.append((z - low, low[:, ::2, ::2]))
        (band_x, x), (band_y, y) = bands
        total += np.abs(band_x - band_y).mean((1, 2, 3))
    return total


def test_laplacian_is_the_difference_of_two_pyramids():
    x, y = images(0), images(1)
    np.testing.assert_allclose(perceptual.laplacian(x, y), reference(x, y), rtol=1e-5)
    assert np.all(perceptual.laplacian(x, x) == 0)


def test_laplacian_sees_lost_detail_and_no_shade():
    x = images()
    blurred = 0.25 * (x + np.roll(x, 1, 1) + np.roll(x, 1, 2) + np.roll(x, (1, 1), (1, 2)))
    shaded = x + np.abs(x - blurred).mean()  # the same L1 distance
    assert np.all(perceptual.laplacian(shaded, x) < 1e-6)
    assert np.all(perceptual.laplacian(blurred, x) > 0.3)


def test_laplacian_weighs_every_octave():
    """A wave of any of four octaves costs about the same, whatever the number of pixels in it."""
    across, costs = np.arange(64), []
    for period in (2, 4, 8, 16):
        wave = np.cos(2 * np.pi * across / period + np.pi / period)
        wave /= np.abs(wave).mean()
        wave = np.broadcast_to(wave[None, None, :, None], (1, 64, 64, 3)).astype(np.float32)
        costs.append(float(perceptual.laplacian(wave, np.zeros_like(wave))[0]))
    assert max(costs) < 2 * min(costs), costs


def test_laplacian_needs_its_levels():
    with pytest.raises(ValueError, match="16 pixels"):
        perceptual.laplacian(images(shape=(1, 15, 64, 3)), images(shape=(1, 15, 64, 3)))


@pytest.mark.parametrize("name", ["laplacian", "none"])
def test_stand_ins_need_no_weights(name):
    distance, params = perceptual.make_perceptual(name)
    x, y = images(0), images(1)
    found = jax.jit(distance)(params, x, y)
    assert found.shape == (3,) and found.dtype == jnp.float32
    expected = perceptual.laplacian(x, y) if name == "laplacian" else jnp.zeros(3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: distance(params, x, y).mean()))(x)
    assert gradient.shape == x.shape and bool(np.any(gradient)) == (name == "laplacian")
    with pytest.raises(UserError, match="takes no weights"):
        perceptual.make_perceptual(name, "vgg.pth")


@pytest.mark.parametrize("tower", ["vgg", "alex"])
def test_lpips_never_falls_back(tower):
    with pytest.raises(UserError, match=f"lpips_{tower} needs its published weights.*laplacian"):
        perceptual.make_perceptual(f"lpips_{tower}")
    with pytest.raises(UserError, match="nowhere.safetensors is missing"):
        perceptual.make_perceptual(f"lpips_{tower}", "nowhere.safetensors")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="lpips_vgg, lpips_alex, laplacian, none"):
        perceptual.make_perceptual("lpips")
