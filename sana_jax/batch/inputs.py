"""Files of pictures and masks that tasks start from: read and checked before anything is drawn.

What is kept of a file is its hash and its size; its pixels are read again when its batch is drawn.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sana_jax.data import images
from sana_jax.pipeline.image_input import check_mask
from sana_jax.runtime.checks import BadArgument
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, named, reason_of
from sana_jax.runtime.progress import Progress

if TYPE_CHECKING:
    from sana_jax.batch.tasks import Task

MAX_FILE = 2**28  # bytes of a file
SETTINGS = "image_sha256", "mask_sha256", "strength"  # of a task that starts from a picture
KEPT = 4  # pictures in memory beside those of the batch: one may be for all prompts


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


def with_inputs(tasks: Sequence["Task"]) -> list["Task"]:
    """Reads and checks the tasks' pictures and masks, and gives tasks the pictures' sizes.

    Raises UserError, naming the line or the flag, and the file.
    """
    due: dict[tuple[str, str], Task] = {}  # name of the field, path -> the first that has it
    for task in tasks:
        for name in "image", "mask":
            if path := getattr(task, name):
                due.setdefault((name, path), task)
    if not due:
        return list(tasks)

    def attempt(item: tuple[tuple[str, str], "Task"]) -> ImageFile:
        (name, path), task = item
        return _open(path, name == "mask", f"{task.place_of(name)}{name}={path}")

    with ThreadPoolExecutor() as pool, Progress(len(due), "picture", "reading", delay=2) as bar:
        found = {}
        try:
            for key, file in zip(due, pool.map(attempt, due.items()), strict=True):
                found[key] = file
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return [_with_inputs(task, found) if task.image else task for task in tasks]


def _with_inputs(task: "Task", found: dict[tuple[str, str], ImageFile]) -> "Task":
    image = found["image", task.image or ""]
    mask = found["mask", task.mask] if task.mask else None
    height, width = image.shape[:2]
    size = f"{width} x {height} pixels (width x height)"
    if mask and mask.shape != (height, width):
        raise UserError(
            f"{task.place_of('mask')}mask={task.mask}: it has {mask.shape[1]} x {mask.shape[0]}"
            f" pixels, where its picture, {task.image}, is {size}"
        )
    for name, asked, own in ("height", task.height, height), ("width", task.width, width):
        if asked not in (None, own):
            raise UserError(
                f"{task.place_of(name)}{name}={asked}: the picture that is drawn has the size of"
                f" the one it starts from, {task.image}, which is {size}; resize it"
            )
    return dataclasses.replace(task, height=height, width=width, inputs=Inputs(image, mask))


def _open(path: str, is_mask: bool, where: str) -> ImageFile:
    content = _content(path, where)
    pixels = _decode(content, is_mask, where)
    try:
        if is_mask:
            check_mask(pixels)
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
