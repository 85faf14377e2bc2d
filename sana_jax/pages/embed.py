"""Pictures made small enough to stand inside a page, as data URIs."""

import base64
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from etils import epath
from PIL import Image, UnidentifiedImageError

from sana_jax.pictures import MODES, on_white
from sana_jax.runtime.files import UNREACHABLE, reason_of
from sana_jax.runtime.progress import Progress

SIDES = (
    1024,
    768,
    512,
    384,
    256,
    192,
    128,
    96,
    64,
)  # pixels of the longer side that are tried, in turn
QUALITY = 80  # of WebP, 0 .. 100
LOSSLESS = 512 * 512  # pixels: of no more than these an exact copy is tried first
LEAST = 6_000  # characters: what a picture needs to be worth a look


def data_uri(content: bytes, most: int) -> str:
    """Returns a picture as a data URI of about `most` characters, in the largest size that fits.

    A small picture is exact if that fits too. Raises ValueError for what is no picture of ours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=["PNG"])
            if image.mode not in MODES:
                raise ValueError(f"its mode is {image.mode}")
            image = on_white(image)
    except UnidentifiedImageError:
        raise ValueError("it is no PNG") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or "it is damaged") from None
    if image.width * image.height <= LOSSLESS:
        exact = _webp(image, lossless=True)
        if len(exact) <= most:
            return exact
    longest = max(image.size)
    for side in min(longest, SIDES[0]), *(side for side in SIDES[1:] if side < longest):
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        found = _webp(small, quality=QUALITY)
        if len(found) <= most:
            break
    return found


def embed(paths: Sequence[epath.Path], most: int) -> list[str | ValueError]:
    """Returns the files as data URIs of `most` characters in all, or why one cannot be shown."""
    share = most // max(len(paths), 1)
    with Progress(total=len(paths), unit="picture") as bar, ThreadPoolExecutor() as pool:
        found = []
        for each in pool.map(partial(_embed, share), paths):
            found.append(each)
            bar.update()
    return found


def _embed(most: int, path: epath.Path) -> str | ValueError:
    try:
        return data_uri(path.read_bytes(), most)
    except UNREACHABLE as error:
        return ValueError(reason_of(error))
    except ValueError as error:
        return error


def _webp(image: Image.Image, **options: bool | int) -> str:
    content = io.BytesIO()
    image.save(content, format="WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
