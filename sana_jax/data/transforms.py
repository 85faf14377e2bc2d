"""Transforms of a record into one row of a batch."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from sana_jax.data import images
from sana_jax.data.records import Record
from sana_jax.models import buckets
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError

Example = dict[str, np.ndarray]

# What networks get. Rows had that type themselves once, and runs of then shall go on.
AS_FLOATS = {"dtype": "float32"}


class Transform(Protocol):
    """Turns a record into its row of a batch."""

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(self, record: Record, rng: np.random.Generator) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Makes {"image": uint8 (height, width, 3)}: decoded, resized to cover the size, cropped.

    Trainings convert them on the device (pictures.to_float), so that they cross to it in a quarter
    of the bytes; what encodes or measures each picture once does it before.

    Attributes:
      crop: "centre"; "random"; or "patch": random and never resized.
      flip: mirror half of the images; not with "centre".
      upscale: enlarge images that are too small; otherwise they are rejected.
    """

    height: int
    width: int
    crop: str = "centre"
    flip: bool = False
    upscale: bool = False
    max_pixels: int = images.MAX_PIXELS
    min_side: int = images.MIN_SIDE

    def __post_init__(self):
        if self.crop not in ("centre", "random", "patch"):
            raise UserError(f"crop={self.crop!r}: it takes centre, random or patch")
        if self.flip and self.crop == "centre":
            raise UserError("flip=True: crop='centre' leaves nothing to chance; give 'random'")
        checks.within("max_pixels", self.max_pixels, 1, images.MOST_PIXELS)

    @property
    def settings(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | AS_FLOATS

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        with _pixels(record, self.max_pixels, self.min_side) as pixels:
            image = images.cover_crop(
                pixels,
                self.height,
                self.width,
                None if self.crop == "centre" else rng,
                flip=self.flip,
                resize=self.crop != "patch",
                upscale=self.upscale,
            )
        return {"image": image}


@dataclasses.dataclass(frozen=True)
class BucketTransform:
    """Makes {"image": uint8 (height, width, 3)} in the size of `table` nearest in aspect ratio.

    It is for batches of orders.bucket_order with the same table and `upscale`. Attributes are those
    of ImageTransform; `crop` is "centre" or "random".
    """

    table: tuple[tuple[int, int], ...]
    crop: str = "centre"
    flip: bool = False
    upscale: bool = False
    max_pixels: int = images.MAX_PIXELS
    min_side: int = images.MIN_SIDE

    def __post_init__(self):
        if self.crop == "patch":
            raise UserError("crop='patch': images are resized to their bucket; centre or random")
        self._of(self.table[0])

    @property
    def settings(self) -> dict[str, Any]:
        table = [list(size) for size in self.table]
        return dataclasses.asdict(self) | AS_FLOATS | {"table": table}

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        with _pixels(record, self.max_pixels, self.min_side) as pixels:
            (bucket,) = buckets.assign(np.array([pixels.shape[:2]]), self.table, upscale=True)
            return self._of(self.table[bucket])(record | {"image": pixels}, rng)

    def _of(self, size: tuple[int, int]) -> ImageTransform:
        options = (self.crop, self.flip, self.upscale, self.max_pixels, self.min_side)
        return ImageTransform(*size, *options)


def _pixels(record: Record, max_pixels: int, min_side: int) -> AbstractContextManager[np.ndarray]:
    """Returns a context with a record's pixels, which InMemory has decoded already."""
    image = record["image"]
    if isinstance(image, bytes):
        return images.decoded(image, max_pixels, min_side)
    return nullcontext(image)


@dataclasses.dataclass(frozen=True)
class StoredLatents:
    """Makes {"latents": float32 (h, w, c)} from stored latents, as the sampler sees them."""

    settings = {"latents": "stored"}

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        return {"latents": record["latents"]}
