"""Pictures as NumPy arrays: sheets, conversion from 8 bits to floats, PNG files.

JAX is not imported, so that commands can check --out before they wait seconds for it. On devices,
metrics/reconstruction.py and pipeline/programs.py round a network's output.
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
from sana_jax.runtime.files import check_is_file, reason_of, write_atomically

Picture = UInt8[np.ndarray, "_ _ 3"]  # height, width: those of a sheet may differ
# Pillow's modes of up to 8 bits a channel: values of others it would clip, and not scale.
MODES = "1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA", "RGBa"


def on_white(image: Image.Image) -> Image.Image:
    """Converts an image of MODES to three channels, with what is transparent on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_opaque(image: Image.Image) -> bool:
    """Returns True if no pixel of an image of MODES is transparent, in whole or in part."""
    if not image.has_transparency_data:
        return True
    return image.convert("RGBA").getextrema()[3][0] == 255


def to_float(images: UInt8[Any, "*B H W C"]) -> Float[Any, "*B H W C"]:
    """Converts 0 .. 255 to float32 in [-1, 1]; NumPy arrays stay in NumPy, JAX arrays in JAX.

    XLA multiplies by a reciprocal, so the two may differ in the last place.
    """
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def make_grid(rows: Sequence[Sequence[Picture]], gap: int = 2) -> Picture:
    """Arranges rows of pictures, which may differ in size, on white, `gap` pixels apart."""
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
    """Splits pictures into rows of `columns` for `make_grid`; the last row may be shorter."""
    return [pictures[i : i + columns] for i in range(0, len(pictures), columns)]


def encode_png(picture: Picture, **options: Any) -> bytes:
    """Returns the bytes of a PNG file; `options` are those of Pillow, such as `pnginfo`."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG", **options)
    return content.getvalue()


def save_png(path: Path, picture: Picture) -> None:
    """Writes a picture atomically. Raises UserError."""
    try:
        write_atomically(epath.Path(path), encode_png(picture))
    except OSError as error:
        raise UserError(f"--out={path}: {reason_of(error)}") from None


def check_out(
    out: str | None, suffix: str = ".png", what: str = "a picture", flag: str = "--out"
) -> Path | None:
    """Returns --out as a path to which a PNG, or `what`, can be written. Raises UserError.

    `flag` is what names it on the command line.
    """
    if out is None:
        return None
    path = Path(out)
    if path.suffix.lower() != suffix:
        raise UserError(f"{flag}={out}: {what} is written; give it a name that ends with {suffix}")
    try:
        if path.is_dir():
            raise UserError(f"{flag}={out} is a folder; name a file")
        check_is_file(path, f"{flag}={out}")
        if not path.parent.is_dir():
            raise UserError(f"{flag}={out}: the folder {path.parent} is not there; make it first")
    except OSError as error:  # no file can have such a name
        raise UserError(f"{flag}={out:.60}: {error.strerror}") from None
    if not all(os.access(it, os.W_OK) for it in (path, path.parent) if it.exists()):
        raise UserError(f"{flag}={out} cannot be written; name another")
    return path
