"""Pictures and masks in files: arrays that are read when they are needed.

What is kept of a file is its hash and its size.
"""

import dataclasses
import functools
import hashlib
from typing import Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sana_jax.data import images
from sana_jax.pipeline.image_input import TRANSPARENT, check_mask
from sana_jax.runtime.checks import BadArgument
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, named, reason_of

MAX_FILE = 2**28  # bytes of a file
SETTINGS = "image_sha256", "mask_sha256", "strength"  # of a task that starts from a picture
KEPT = 2  # files in memory beside those of the batch: a picture and its mask may be for all prompts


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An array of uint8 in a file: a picture (height, width, 3) or a mask (height, width)."""

    path: str
    sha256: str  # of the file's content
    shape: tuple[int, ...]

    dtype: ClassVar = np.dtype(np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the pixels. Raises UserError if the file is not what it was."""
        return _pixels_of(self)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a task starts from."""

    image: ImageFile
    mask: ImageFile | None

    @property
    def settings(self) -> dict[str, str | None]:
        """The settings that decide its pixels."""
        mask = self.mask and self.mask.sha256
        return {"image_sha256": self.image.sha256, "mask_sha256": mask}


def open_image(path: str, is_mask: bool, where: str) -> ImageFile:
    """Reads and checks a file. Raises UserError, which begins with `where`."""
    content = _content(path, where)
    pixels = _decode(content, is_mask, where)
    try:
        if is_mask:
            check_mask(pixels)
            if images.shows_through(content):
                raise BadArgument("mask", TRANSPARENT)
    except BadArgument as error:
        raise UserError(f"{where}: {str(error).removeprefix('mask ')}") from None
    return ImageFile(path, hashlib.sha256(content).hexdigest(), pixels.shape)


@functools.lru_cache(KEPT)
def _pixels_of(file: ImageFile) -> np.ndarray:
    content = _content(file.path, file.path)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise UserError(f"{file.path} has changed since this command began; start it again")
    pixels = _decode(content, len(file.shape) == 2, file.path)
    pixels.setflags(write=False)  # others get the same
    return pixels


def _content(path: str, where: str) -> bytes:
    try:
        file = epath.Path(named(path))
        check_is_file(file, where)
        if (size := file.stat().length) > MAX_FILE:
            raise UserError(f"{where} has {size} bytes, {MAX_FILE} at most")
        return file.read_bytes()
    except UNREACHABLE as error:
        raise UserError(f"{where}: {reason_of(error)}") from None


def _decode(content: bytes, is_mask: bool, where: str) -> UInt8[np.ndarray, "H W *c"]:
    try:
        pixels = images.decode(content, min_side=1)
    except images.BadImage as error:
        raise UserError(f"{where}: {images.REASONS[error.reason]} ({error})") from None
    return np.array(Image.fromarray(pixels).convert("L")) if is_mask else pixels
