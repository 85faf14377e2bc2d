"""Aspect-ratio buckets: the sizes that the published models were trained on.

One table at 1024 px, scaled by 1/2, 2 and 4 for the others (SANA's code; sizes of PixArt-alpha).
"""

import numpy as np
from jaxtyping import Int

from sana_jax.runtime.errors import UserError

# height x width; a bucket is looked up by height / width, rounded to two digits.
_TRAINING_1024 = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
    (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768),
    (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576),
    (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip

# Sampling at 512 and 1024 px leaves out the rarest ratios, as diffusers' pipeline does.
_RARE = {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}


BASES = (512, 1024, 2048, 4096)  # pixels a side; there are buckets around these


def ratio(size: tuple[int, int]) -> float:
    """Returns height / width rounded to two digits, the key of a bucket."""
    return round(size[0] / size[1], 2)


def training_buckets(base: int) -> tuple[tuple[int, int], ...]:
    """Returns the 40 (height, width) of models trained at `base` px: 512, 1024, 2048 or 4096.

    Raises UserError for any other `base`.
    """
    if base not in BASES:
        raise UserError(f"there are no buckets for {base} px, only for 512, 1024, 2048 and 4096")
    return tuple((h * base // 1024, w * base // 1024) for h, w in _TRAINING_1024)


def sampling_buckets(base: int) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) that resolution binning chooses from."""
    sizes = training_buckets(base)
    return tuple(s for s in sizes if base > 1024 or ratio(s) not in _RARE)


def nearest(height: int, width: int, base: int) -> tuple[int, int]:
    """Returns the sampling bucket whose aspect ratio is nearest to that of the requested size."""
    return min(sampling_buckets(base), key=lambda s: abs(ratio(s) - height / width))


def assign(
    sizes: Int[np.ndarray, "N 2"], table: tuple[tuple[int, int], ...], upscale: bool = False
) -> Int[np.ndarray, " N"]:
    """Returns each image's bucket, the index in `table` of the nearest aspect ratio.

    The index is -1 for an image without a size, (0, 0), and, unless `upscale`, for an image with a
    side below its bucket's.
    """
    by_ratio = np.argsort([ratio(size) for size in table], kind="stable")
    ratios = np.array([ratio(table[i]) for i in by_ratio])
    height, width = np.asarray(sizes).T
    # The midpoints between neighbouring ratios separate the buckets.
    found = by_ratio[np.searchsorted((ratios[1:] + ratios[:-1]) / 2, height / np.maximum(width, 1))]
    usable = height > 0
    if not upscale:
        usable &= (sizes >= np.array(table)[found]).all(-1)
    return np.where(usable, found, -1)
