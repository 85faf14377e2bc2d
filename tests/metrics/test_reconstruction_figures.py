"""The means over a data set, against each image by itself."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sana_jax.metrics import reconstruction
from sana_jax.metrics.reconstruction_figures import figures
from sana_jax.pictures import to_float

COUNT, BATCH, SIDE = 5, 2, 32


def data():
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)


def batches(images, poison=200):
    """Batches of images, and of rows beyond them that must not count."""
    for start in range(0, COUNT, BATCH):
        rows = images[start : start + BATCH]
        missing = BATCH - len(rows)
        mask = np.arange(BATCH) < len(rows)
        fill = np.full((missing, *images.shape[1:]), poison, np.uint8)
        yield {"image": np.concatenate([rows, fill]), "valid": mask}


def halve(images):
    return 0.5 * images


def test_means_over_the_images_that_count():
    originals, seen = data(), []
    found = figures(halve, batches(originals), 32 / 32**2, on_batch=seen.append)
    halved = np.floor(0.5 * to_float(originals) * 127.5 + 128).astype(np.uint8)
    small = np.asarray(reconstruction.down_and_up(originals, (3, 3)))  # 27 of 32 values
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    for prefix, others in ("", halved), ("baseline_", small):
        pairs = list(zip(originals, others, strict=True))
        psnr = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]
        ssim = [structural_similarity(a, b, channel_axis=-1, **options) for a, b in pairs]
        assert found[f"{prefix}psnr"] == pytest.approx(np.mean(psnr), abs=1e-4)
        assert found[f"{prefix}ssim"] == pytest.approx(np.mean(ssim), abs=1e-4)
    assert found["high_frequency_ratio"] == pytest.approx(0.25, rel=0.01)
    assert found["baseline_high_frequency_ratio"] < 0.01
    assert (found["count"], found["baseline_size"], seen) == (COUNT, [3, 3], [2, 2, 1])
    assert found["lpips"] is None and found["baseline_lpips"] is None


def test_a_distance_sees_rounded_pictures_of_both_kinds():
    def distance(x, y):
        assert x.dtype == y.dtype == jnp.float32
        return jnp.abs(x - y).mean(axis=(1, 2, 3))

    found = figures(lambda x: x + 0.4 / 255, batches(data()), 0.1, distance)
    assert found["lpips"] == 0  # less than half a grey level is rounded away
    assert found["psnr"] > 80
    assert found["baseline_lpips"] > 0.1


def test_what_is_not_finite_is_not_hidden():
    def broken(images):
        return images.at[1].set(jnp.nan)

    found = figures(lambda x: broken(jnp.asarray(x)), batches(data()), 0.1)
    assert math.isnan(found["psnr"]) and math.isnan(found["high_frequency_ratio"])
    assert math.isfinite(found["baseline_psnr"])

    def poisoned(images):  # NaN where a row has one colour, which here is what does not count
        blank = np.ptp(images, axis=(1, 2, 3), keepdims=True) == 0
        return jnp.where(blank, jnp.nan, halve(images))

    assert math.isfinite(figures(poisoned, batches(data()), 0.1)["psnr"])


def test_flat_originals_have_no_detail_to_compare():
    found = figures(lambda x: x, batches(np.zeros_like(data()), poison=0), 0.1)
    assert found["high_frequency_ratio"] is None
