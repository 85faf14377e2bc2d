"""The pictures that a network of a metric sees: resized, cropped and scaled as its field does.

    bilinear    pytorch-fid's and SANA's: without antialiasing, on the network's own scale
    bicubic     clean-fid's: antialiased, in floats; a value v becomes (v - 128) / 128
    clip        OpenAI's: the shorter side by Pillow's bicubic filter, and the centre
    cmmd        CMMD's: the largest centred square, by the same filter

All run on the host, in NumPy and Pillow, so that a result depends on no device.
"""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sana_jax.models.inception import SIDE

Pixels = UInt8[np.ndarray, "_ _ 3"]
Floats = Float[np.ndarray, "_ _ 3"]
JPEG_QUALITY = 75  # Pillow's default
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def cover_and_crop(pixels: Pixels, side: int, method: Image.Resampling) -> Pixels:
    """Resizes the shorter side to `side`, rounded to 8 bits, and crops the centre.

    Sizes and places are those of torchvision's Resize and CenterCrop, of which the first truncates
    and the second rounds half to even.
    """
    height, width = pixels.shape[:2]
    if min(height, width) != side:
        size = (side, int(side * height / width)) if width <= height else None
        size = size or (int(side * width / height), side)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, method))
    top, left = (round((have - side) / 2.0) for have in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def bilinear(pixels: Pixels) -> Floats:
    """Returns 299 x 299 pixels in [-1, 1], interpolated between the nearest four of the picture.

    The bits of torch's interpolate(mode="bilinear", align_corners=False) in float32 on a CPU, whose
    products and sums are fused.
    """
    x = pixels
    for axis in (1, 0):
        low, high, weight = _neighbours(pixels.shape[axis])
        weight = weight[:, None] if axis else weight[:, None, None]
        a, b = (_unit(np.take(x, index, axis)) for index in (low, high))
        x = _fused(a, np.float32(1) - weight, b * weight)
    return np.float32(2) * x - np.float32(1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.float32(255) if x.dtype == np.uint8 else x


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a b + c, rounded once to float32: float64 holds the product exactly."""
    total = np.multiply(a, b, dtype=np.float64)
    total += c
    return total.astype(np.float32)


def _neighbours(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two pixels that each new one lies between, and the second one's weight."""
    scale = np.float32(side) / np.float32(SIDE)
    centres = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    place = np.maximum(_fused(scale, centres, np.float32(-0.5)), np.float32(0))
    low = np.minimum(place.astype(np.int64), side - 1)
    return low, np.minimum(low + 1, side - 1), place - low.astype(np.float32)


def bicubic(pixels: Pixels) -> Floats:
    """Returns 299 x 299 pixels in [-1, 1), resized in floats by Pillow's bicubic filter.

    Each channel is resized alone and clipped to 0 .. 255 without being rounded (arXiv 2104.11222).
    """
    channels = [
        np.asarray(Image.fromarray(pixels[..., i].astype(np.float32)).resize((SIDE, SIDE), BICUBIC))
        for i in range(3)
    ]
    return (np.stack(channels, -1).clip(0, 255) - np.float32(128)) / np.float32(128)


def clip(pixels: Pixels, side: int, mean: tuple, std: tuple) -> Floats:
    """Returns side x side pixels, normalised, as OpenAI's CLIP preprocesses pictures."""
    return _normalised(cover_and_crop(pixels, side, BICUBIC), mean, std)


def cmmd(pixels: Pixels, side: int, mean: tuple, std: tuple) -> Floats:
    """Returns side x side pixels, normalised, as the reference of CMMD preprocesses pictures."""
    height, width = pixels.shape[:2]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    image = Image.fromarray(pixels[top : top + square, left : left + square])
    return _normalised(np.asarray(image.resize((side, side), BICUBIC)), mean, std)


def _normalised(pixels: Pixels, mean: tuple, std: tuple) -> Floats:
    return (_unit(pixels) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def as_jpeg(pixels: Pixels) -> Pixels:
    """Returns the pixels of a JPEG of Pillow's default quality, which torchvision's files have."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="JPEG", quality=JPEG_QUALITY)
    with Image.open(content) as image:
        return np.asarray(image)


RESIZES: dict[str, Callable[[Pixels], Floats]] = {"bilinear": bilinear, "bicubic": bicubic}


def inception_input(resize: str, size: int | None) -> Callable[[Pixels], Floats]:
    """Returns what prepares a picture for Inception.

    Args:
      resize: a name of RESIZES.
      size: pixels; the picture is first resized to cover a square of it, by Pillow's bilinear
        filter, and cropped, as SANA's evaluation does with 512; None: it is not.
    """
    if size is None:
        return RESIZES[resize]
    return lambda pixels: RESIZES[resize](cover_and_crop(pixels, size, BILINEAR))


def clip_input(kind: str, side: int, mean: tuple, std: tuple) -> Callable[[Pixels], Floats]:
    """Returns what prepares a picture for CLIP; `kind` is "clip" or "cmmd"."""
    return partial({"clip": clip, "cmmd": cmmd}[kind], side=side, mean=mean, std=std)
