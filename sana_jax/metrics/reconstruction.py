"""Measures of a reconstruction against its image: PSNR, SSIM, high frequencies; and a baseline.

Pictures are compared as they are saved, with 8 bits per value: floor(255 (y + 1) / 2 + 0.5) for y
in [-1, 1], as in the evaluations of DC-AE and SANA. Every metric returns one number per image;
reconstruction_figures.py averages them.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

SIGMA, TRUNCATE = 1.5, 3.5  # of SSIM's window: in pixels, and its end in units of SIGMA
RADIUS = int(TRUNCATE * SIGMA + 0.5)
CUTOFF = 0.25  # cycles per pixel; the finest that a grid of pixels holds is 0.5


@jax.jit
def to_uint8(images: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """Returns images in [-1, 1] as they are saved: rounded half up and clipped."""
    return jnp.clip(jnp.floor(images * 127.5 + 128), 0, 255).astype(jnp.uint8)


@jax.jit
def psnr(images: UInt8[Array, "B H W C"], others: UInt8[Array, "B H W C"]) -> Float[Array, " B"]:
    """Returns the peak signal-to-noise ratio in dB: 10 log10(255^2 / mean squared error).

    Equal images, whose ratio is infinite, count as different by one grey level in a single value.
    """
    error = (images.astype(jnp.float32) - others.astype(jnp.float32)) ** 2
    values = math.prod(images.shape[1:])
    return 10 * jnp.log10(255.0**2 * values / jnp.maximum(jnp.sum(error, axis=(1, 2, 3)), 1))


@jax.jit
def ssim(images: UInt8[Array, "B H W C"], others: UInt8[Array, "B H W C"]) -> Float[Array, " B"]:
    """Returns the structural similarity (Wang et al. 2004), averaged over channels and pixels.

    The windows are Gaussian with sigma 1.5, have 11 x 11 pixels and lie inside the image. K1 is
    0.01, K2 is 0.03, and variances are divided by n. This is scikit-image's structural_similarity
    with gaussian_weights=True, use_sample_covariance=False and data_range=255. Raises ValueError if
    a side has fewer than 11 pixels.
    """
    if min(images.shape[1:3]) <= 2 * RADIUS:
        raise ValueError(f"SSIM needs images of {2 * RADIUS + 1} pixels a side or more")
    # The shift leaves variances as they are, and keeps the squares small, with less rounding.
    x, y = (z.astype(jnp.float32) - 128 for z in (images, others))
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + 128, mean_y + 128
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _smooth(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Returns weighted means over the windows that lie inside the image."""
    weights = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-RADIUS, RADIUS + 1)]
    weights = [weight / sum(weights) for weight in weights]
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width * channels)  # long rows: the sums below become vectors
    for axis, step in (1, 1), (2, channels):
        size = x.shape[axis] - 2 * RADIUS * step
        x = sum(
            weight * jax.lax.slice_in_dim(x, i * step, i * step + size, axis=axis)
            for i, weight in enumerate(weights)
        )
    return x.reshape(batch, height - 2 * RADIUS, width - 2 * RADIUS, channels)


@jax.jit
def high_frequency_energy(images: UInt8[Array, "B H W C"]) -> Float[Array, " B"]:
    """Returns the mean square of the detail finer than CUTOFF, four pixels per cycle.

    A Hann window is applied before the Fourier transform, so that the jump from one border of the
    image to the opposite one does not count as detail. For a set of images, divide the mean of the
    reconstructions by that of the originals: the ratio is below 1 where detail is lost, and above 1
    where it is made up. (The mean of the ratios would follow the few images with almost no detail.)
    """
    height, width = images.shape[1:3]
    x = images.astype(jnp.float32)
    x = x - jnp.mean(x, axis=(1, 2), keepdims=True)
    window = jnp.hanning(height + 2)[1:-1, None] * jnp.hanning(width + 2)[1:-1]
    spectrum = jnp.fft.fft2(x * window[None, :, :, None], axes=(1, 2))
    rows, columns = jnp.fft.fftfreq(height)[:, None], jnp.fft.fftfreq(width)
    fine = jnp.hypot(rows, columns) > CUTOFF
    energy = jnp.where(fine[None, :, :, None], jnp.abs(spectrum) ** 2, 0)
    return jnp.mean(energy, axis=(1, 2, 3)) / jnp.sum(window**2)


def baseline_size(height: int, width: int, values: int, channels: int = 3) -> tuple[int, int]:
    """Returns the largest (height, width) of these proportions with at most `values` values.

    An autoencoder of factor 32 and 32 channels turns 128 x 128 pixels into 4 x 4 x 32 = 512 values;
    the largest picture within them has 13 x 13 x 3 = 507.
    """
    scale = min(1, math.sqrt(values / (height * width * channels)))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


@partial(jax.jit, static_argnums=1)
def down_and_up(images: UInt8[Array, "B H W C"], size: tuple[int, int]) -> UInt8[Array, "B H W C"]:
    """Resizes images to `size` and back, bicubic, with antialiasing on the way down.

    This is the simplest compression to as few values.
    """
    batch, height, width, channels = images.shape
    small = jax.image.resize(
        images.astype(jnp.float32), (batch, *size, channels), "cubic", antialias=True
    )
    large = jax.image.resize(small, images.shape, "cubic", antialias=True)
    return jnp.clip(jnp.floor(large + 0.5), 0, 255).astype(jnp.uint8)
