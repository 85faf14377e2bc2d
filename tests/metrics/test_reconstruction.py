"""The metrics against scikit-image, NumPy's float64 and Pillow."""

import jax
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sana_jax.checkpoints.scale import scene
from sana_jax.metrics import reconstruction as metrics


def pictures(height=40, width=56):
    """Detail, flat areas and saturation, with several kinds of damage."""
    random = np.random.default_rng(0)
    clean = np.broadcast_to(scene(64)[:, :height, :width], (5, height, width, 3)).copy()
    clean[1] = random.uniform(-1, 1, clean[1].shape)
    clean[2] = 1  # saturated
    clean[3] = 0.1
    clean[4, : height // 2] = -1
    damage = np.float32([0.02, 0.3, 0.01, 0.5, 0.1])[:, None, None, None]
    damaged = clean + damage * random.standard_normal(clean.shape, np.float32)
    damaged[3] = 0.11  # flat on flat: where rounding in the variances would show
    return metrics.to_uint8(clean), metrics.to_uint8(damaged)


def test_rounds_half_up_and_clips():
    values = np.float32([-9, -1, -1 + 0.99 / 255, -1 + 1.01 / 255, 0, 1, 1.01, 9])
    found = metrics.to_uint8(values.reshape(1, 2, 4, 1)).ravel()
    assert found.dtype == np.uint8 and found.tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert (metrics.to_uint8(every / np.float32(127.5) - 1) == every).all()


def test_psnr_agrees_with_scikit_image():
    clean, damaged = map(np.asarray, pictures())
    expected = [
        peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(clean, damaged, strict=True)
    ]
    np.testing.assert_allclose(metrics.psnr(clean, damaged), expected, atol=1e-4)


def test_psnr_of_equal_pictures_is_that_of_one_grey_level():
    x, _ = pictures()
    y = np.asarray(x).copy()
    y[0, 3, 3, 1] ^= 1
    np.testing.assert_array_equal(metrics.psnr(x, x)[:1], metrics.psnr(x, y)[:1])
    assert metrics.psnr(x, x)[0] == pytest.approx(10 * np.log10(255**2 * y[0].size), abs=1e-4)


def test_ssim_agrees_with_scikit_image():
    clean, damaged = map(np.asarray, pictures())
    expected = [
        structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            truncate=3.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=-1,
        )
        for a, b in zip(clean, damaged, strict=True)
    ]
    found = np.asarray(metrics.ssim(clean, damaged))
    print(f"largest difference {np.abs(found - expected).max():.1e}, values {found}")
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the bar is 1e-4
    np.testing.assert_allclose(metrics.ssim(clean, clean), 1, atol=1e-6)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="11 pixels"):
        metrics.ssim(np.zeros((1, 10, 40, 3), np.uint8), np.zeros((1, 10, 40, 3), np.uint8))


def test_high_frequency_energy_is_that_of_the_transform():
    x = np.asarray(pictures()[0])[:2]
    height, width = x.shape[1:3]
    x64 = x - x.mean((1, 2), keepdims=True, dtype=np.float64)
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    expected = np.zeros(2)
    for i in range(2):
        for c in range(3):
            power = np.abs(np.fft.fft2(x64[i, :, :, c] * window)) ** 2
            for p in range(height):
                for q in range(width):
                    u, v = min(p, height - p) / height, min(q, width - q) / width
                    if u**2 + v**2 > 0.25**2:
                        expected[i] += power[p, q]
    expected /= height * width * 3 * (window**2).sum()
    np.testing.assert_allclose(metrics.high_frequency_energy(x), expected, rtol=1e-4)


def test_high_frequency_energy_sees_fine_detail_alone():
    """White noise of variance v has (1 - pi / 16) v of it; a slow wave and a ramp have none."""
    noise = np.random.default_rng(0).normal(128, 20, (8, 64, 64, 3)).round().astype(np.uint8)
    share = np.mean(metrics.high_frequency_energy(noise)) / noise.var(dtype=np.float64)
    assert share == pytest.approx(1 - np.pi / 16, rel=0.02)
    across = np.arange(64)
    wave, ramp = 128 + 100 * np.sin(across * 2 * np.pi / 8), 4 * across
    slow = np.stack([np.broadcast_to(row[None, :, None], (64, 64, 3)) for row in (wave, ramp)])
    energy = metrics.high_frequency_energy(slow.astype(np.uint8))
    assert np.all(energy < 1e-3 * slow.var(axis=(1, 2, 3)))


def test_baseline_has_no_more_values():
    assert metrics.baseline_size(128, 128, 512) == (13, 13)
    assert metrics.baseline_size(64, 64, 10**6) == (64, 64)
    height, width = metrics.baseline_size(64, 256, 2 * 8 * 32)
    assert height * width * 3 <= 512 and width == pytest.approx(4 * height, abs=4)


def test_baseline_is_pillows_bicubic():
    clean = np.asarray(pictures(40, 56)[0])
    found = np.asarray(metrics.down_and_up(clean, (13, 18))).astype(int)
    for ours, image in zip(found, clean, strict=True):
        small = Image.fromarray(image).resize((18, 13), Image.Resampling.BICUBIC)
        theirs = np.asarray(small.resize((56, 40), Image.Resampling.BICUBIC)).astype(int)
        # Pillow rounds and clips the small picture to 8 bits, ours keeps what the bits would hide.
        assert np.abs(ours - theirs).mean() < 0.7
    assert found.dtype == int and (metrics.down_and_up(clean, (40, 56)) == clean).all()


def test_an_image_is_measured_alone():
    clean, damaged = pictures()
    for metric in (metrics.psnr, metrics.ssim):
        alone = [float(metric(clean[i : i + 1], damaged[i : i + 1])[0]) for i in range(5)]
        np.testing.assert_allclose(metric(clean, damaged), alone, rtol=1e-5)
    assert isinstance(metrics.psnr(clean, damaged), jax.Array)
