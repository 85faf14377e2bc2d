"""The pictures that drawing starts from, and masks that say what of them is redrawn.

Image to image (SDEdit, arXiv 2108.01073) runs the last ceil(strength * num_steps) steps of the
schedule, as diffusers' pipelines do, from the picture's latents x0 at the first sigma of these:

    x = (1 - sigma) x0 + sigma noise

The noise is that of text to image with the same seed. At strength 1 without a mask nothing of the
picture would be left: it decides the size alone, and the call is text to image, to the bit.

A mask is white where the picture is redrawn and black where it is kept; one latent stands for
factor x factor pixels and is redrawn if any of them is at least half white. Kept latents lead the
others (diffusion/inpainting.py). At the end the drawn pixels are laid over the picture by the mask
at its own resolution, so that a black pixel is the picture's own byte. A mask of two values has a
hard seam, where the autoencoder's rendering meets the original; greys blend the two.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from sana_jax.pictures import MODES, is_opaque, on_white
from sana_jax.runtime.checks import BadArgument, near, number

STRENGTH = 0.6  # unless told otherwise, as in diffusers' pipelines of flow models
SPRINT_STRENGTH = 0.5  # 0.6 of two steps would be both of them, from noise alone
HALF_WHITE = 128  # of 255: at least one pixel of a redrawn latent has it
# On white all of a mask would be redrawn; without its transparency, what an editor left below.
TRANSPARENT = "has transparent parts, which do not say what is redrawn: fill them, white or black"
# Decimals of a number of steps: 0.14 * 50 is 7.000000000000001, and meant to be 7.
DECIMALS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class ImageInput:
    """Pictures of one size, and their masks; one for all prompts, or one per prompt.

    Each is an array of uint8, (H, W, 3) or (H, W), or something with their shape and dtype that
    NumPy can read (`__array__`), which happens when it is drawn.
    """

    pictures: list[Any]
    masks: list[Any] | None
    strength: float

    @classmethod
    def of(
        cls, image: Any, strength: Any, mask: Any, prompts: int, default: float = STRENGTH
    ) -> "ImageInput | None":
        """Checks SanaPipeline's arguments. Raises BadArgument, naming the one that is wrong.

        `default`: the strength, if None is given.
        """
        if image is None:
            for name, value in ("strength", strength), ("mask", mask):
                if value is not None:
                    raise BadArgument(name, "is of no use without an image to start from")
            return None
        pictures = [_picture(each) for each in _listed(image, 3)]
        masks = None if mask is None else [_mask(each) for each in _listed(mask, 2)]
        for name, values in ("image", pictures), ("mask", masks or pictures):
            if len(values) not in (1, prompts):
                raise BadArgument(name, f"has {len(values)} pictures for {prompts} prompts")
        size = pictures[0].shape[:2]
        for name, value in [("image", x) for x in pictures] + [("mask", x) for x in masks or ()]:
            if value.shape[:2] != size:
                wrong = f"is {_pixels(value.shape)}, where the first picture is {_pixels(size)}"
                raise BadArgument(name, f"{wrong}: resize it")
        strength = number("strength", default if strength is None else strength, 0, 1)
        if not strength:
            raise BadArgument("strength", "0.0 leaves no step to be drawn: give more, up to 1")
        return cls(pictures, masks, strength)

    def sides(self, height: int | None, width: int | None, step: int) -> tuple[int, int]:
        """Returns (height, width) of what is drawn, which is that of the pictures.

        Args:
          height, width: as asked for; None: the pictures'.
          step: what sides must be multiples of.

        Raises BadArgument.
        """
        own = self.pictures[0].shape[:2]
        asked = tuple(a if b is None else b for a, b in zip(own, (height, width), strict=True))
        if asked != own:
            what = f"is {_pixels(own)}, where {_pixels(asked)} are to be drawn: resize it"
            raise BadArgument("image", what)
        if any(side % step for side in own):
            rows, columns = (near(side, step) if side % step else str(side) for side in own)
            raise BadArgument(
                "image",
                f"is {_pixels(own)}, which are no multiples of {step}: resize it to a width of"
                f" {columns} and a height of {rows}",
            )
        return own

    def steps(self, num_steps: int) -> int:
        """Returns how many of the schedule's steps are run, the last ones: at least one."""
        return max(1, math.ceil(round(self.strength * num_steps, DECIMALS)))

    def read(self) -> "Pixels":
        """Reads the pictures and the masks. Raises BadArgument for a mask that redraws nothing."""
        pictures = np.stack([np.asarray(picture) for picture in self.pictures])
        if self.masks is None:
            return Pixels(pictures, None)
        masks = np.stack([np.asarray(mask) for mask in self.masks])
        for mask in masks:
            check_mask(mask)
        return Pixels(pictures, masks)


class Pixels(NamedTuple):
    """What is in the pictures and the masks of an ImageInput."""

    pictures: UInt8[np.ndarray, "N H W 3"]
    masks: UInt8[np.ndarray, "N H W"] | None


def redrawn_latents(masks: UInt8[np.ndarray, "N H W"], factor: int) -> Bool[np.ndarray, "N h w 1"]:
    """Returns the latents that are redrawn: those with any pixel that is at least half white."""
    count, height, width = masks.shape
    blocks = masks.reshape(count, height // factor, factor, width // factor, factor)
    return np.any(blocks >= HALF_WHITE, axis=(2, 4))[..., None]


def check_mask(mask: UInt8[np.ndarray, "H W"]) -> None:
    """Raises BadArgument for a mask that redraws nothing, such as one of the values 0 and 1."""
    if mask.max() < HALF_WHITE:
        raise BadArgument(
            "mask",
            f"redraws nothing: its brightest pixel is {mask.max()}, and 255 is redrawn, 0 is kept",
        )


def _listed(value: Any, axes: int) -> list[Any]:
    """Returns one picture, several, or an array of several as a list."""
    if isinstance(value, list | tuple):
        return list(value)
    return [*value] if len(getattr(value, "shape", ())) == axes + 1 else [value]


def _picture(value: Any) -> Any:
    if isinstance(value, Image.Image):
        _check_mode("image", value)
        return np.asarray(on_white(value))  # as the command line reads a file
    shape: tuple[int, ...] = getattr(value, "shape", ())
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or getattr(value, "dtype", 0) != np.uint8:
        what = "neither a PIL image nor an array of uint8 (height, width, 3)"
        raise BadArgument("image", f"{_described(value)} is {what}")
    return value


def _mask(value: Any) -> Any:
    if isinstance(value, Image.Image):
        _check_mode("mask", value)
        if not is_opaque(value):
            raise BadArgument("mask", TRANSPARENT)
        value = np.asarray(value.convert("L"))
    if getattr(value, "dtype", None) == np.bool_:
        value = np.asarray(value, np.uint8) * np.uint8(255)
    shape = getattr(value, "shape", ())
    if len(shape) != 2 or 0 in shape or getattr(value, "dtype", 0) != np.uint8:
        what = "neither a PIL image nor an array of bools or uint8 (height, width)"
        raise BadArgument("mask", f"{_described(value)} is {what}")
    return value


def _check_mode(name: str, image: Image.Image) -> None:
    if image.mode not in MODES:
        raise BadArgument(
            name, f"has Pillow's mode {image.mode}: convert it to RGB or L, of 8 bits"
        )


def _described(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"{value!r:.60}" if shape is None else f"of {dtype} {tuple(shape)}"


def _pixels(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]} pixels (width x height)"
