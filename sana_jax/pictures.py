"""Pictures in NumPy: sheets of them, 8 bits and floats, PNG.

JAX is not imported: commands look at --out before that takes its seconds. How a network's output is
rounded on devices is in metrics/reconstruction.py and pipeline.py.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import reason_of, write_atomically

Picture = UInt8[np.ndarray, "H W 3"]


def to_float(images: UInt8[Any, "*B H W 3"]) -> Float[Any, "*B H W 3"]:
    """Returns 0 .. 255 as float32 in [-1, 1]: an array of NumPy for one, of JAX for one of JAX.

    XLA multiplies by a reciprocal, so that the two may differ in the last place.
    """
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def make_grid(rows: Sequence[Sequence[Picture]], gap: int = 2) -> Picture:
    """Rows of pictures side by side on white, `gap` pixels apart; they may differ in size."""
    height = max(picture.shape[0] for row in rows for picture in row)
    width = max(picture.shape[1] for row in rows for picture in row)
    columns = max(map(len, rows))
    size = len(rows) * (height + gap) - gap, columns * (width + gap) - gap
    sheet = np.full((*size, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def in_rows(pictures: Sequence[Picture], columns: int) -> list[Sequence[Picture]]:
    """Pictures for `make_grid`, in rows of so many; the last may have fewer."""
    return [pictures[i : i + columns] for i in range(0, len(pictures), columns)]


def encode_png(picture: Picture, **options: Any) -> bytes:
    """A picture as a PNG file; `options` are those of Pillow, such as `pnginfo`."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG", **options)
    return content.getvalue()


def save_png(path: Path, picture: Picture) -> None:
    """Writes a picture whole or not at all. Raises UserError."""
    try:
        write_atomically(epath.Path(path), encode_png(picture))
    except OSError as error:
        raise UserError(f"--out={path}: {reason_of(error)}") from None


def check_out(out: str | None) -> Path | None:
    """The path of --out, where a picture can be put. Raises UserError."""
    if out is None:
        return None
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out={out}: a picture is written; give it a name that ends with .png")
    try:
        if path.is_dir():
            raise UserError(f"--out={out} is a folder; name a file")
        if not path.parent.is_dir():
            raise UserError(f"--out={out}: the folder {path.parent} is not there; make it first")
    except OSError as error:  # a name that no file can have
        raise UserError(f"--out={out:.60}: {error.strerror}") from None
    if not all(os.access(it, os.W_OK) for it in (path, path.parent) if it.exists()):
        raise UserError(f"--out={out} cannot be written; name another")
    return path
