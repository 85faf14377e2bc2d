"""The figures of an autoencoder on held-out images: one row of a table of reconstruction."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sana_jax.metrics import reconstruction as metrics
from sana_jax.pictures import to_float

Images = Float[Array, "B H W 3"]


def figures(
    reconstruct: Callable[[Images], Images],
    batches: Iterable[dict[str, np.ndarray]],
    values: float,
    distance: Callable[[Images, Images], Float[Array, " B"]] | None = None,
    on_batch: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Returns means over the images of an EvaluationLoader; NaN if a reconstruction is not finite.

    Args:
      reconstruct: maps images, float32 (B, H, W, 3) in [-1, 1], to their reconstructions, alike.
      batches: dictionaries with "image", uint8, and "valid".
      values: numbers per pixel in the latent of an image; the baseline is a picture with no more.
      distance: LPIPS, for images in [-1, 1]; None: it is not measured.
      on_batch: called after every batch with the number of its images.

    Returns:
      count; psnr, ssim, lpips (or None); high_frequency_ratio, the reconstructions' energy divided
      by that of the images (None if that is zero); the same four, as baseline_psnr and so on, for
      the images resized down and up; and baseline_size, the height and width between.
    """
    rows: list[dict[str, Any]] = []
    for batch in batches:
        height, width = batch["image"].shape[1:3]
        small = metrics.baseline_size(height, width, int(values * height * width))
        row = _row(batch["image"], reconstruct(to_float(batch["image"])), small, distance)
        rows.append(row | {"valid": batch["valid"]})
        # Waits for the batch before this one, while this one runs.
        rows[-2:-1] = jax.device_get(rows[-2:-1])
        on_batch(int(batch["valid"].sum()))
    columns = {
        name: np.concatenate([row[name] for row in jax.device_get(rows)]) for name in rows[0]
    }
    valid = columns.pop("valid")
    means = {name: float(column[valid].mean(dtype="f8")) for name, column in columns.items()}
    energy = means.pop("energy_of_images")
    found: dict[str, Any] = {"count": int(valid.sum()), "baseline_size": list(small)}
    for prefix in ("", "baseline_"):
        found |= {prefix + name: means.get(prefix + name) for name in ("psnr", "ssim", "lpips")}
        ratio = means[f"{prefix}energy"] / energy if energy else None
        found[f"{prefix}high_frequency_ratio"] = ratio
    return found


def _row(
    images: UInt8[np.ndarray, "B H W 3"],
    reconstructions: Images,
    small: tuple[int, int],
    distance: Callable | None,
) -> dict[str, Float[Array, " B"]]:
    """Returns the figures of every image of a batch, without waiting for them."""
    finite = jnp.isfinite(reconstructions).all(axis=(1, 2, 3))  # 8 bits would hide a NaN
    images = jnp.asarray(images)
    baseline = metrics.down_and_up(images, small)
    row = {"energy_of_images": metrics.high_frequency_energy(images)}
    for prefix, pictures in ("", metrics.to_uint8(reconstructions)), ("baseline_", baseline):
        found = {
            "psnr": metrics.psnr(images, pictures),
            "ssim": metrics.ssim(images, pictures),
            "energy": metrics.high_frequency_energy(pictures),
        }
        if distance is not None:
            found["lpips"] = distance(to_float(pictures), to_float(images))
        for name, column in found.items():
            row[prefix + name] = column if prefix else jnp.where(finite, column, jnp.nan)
    return row
