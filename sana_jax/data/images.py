"""Decodes the images of found folders to pixels, or says why an image cannot be used.

Pixels are sRGB as stored: colour profiles are not applied. Only the first of several frames or
pages is read. 16-bit colour loses its low byte in Pillow's decoder; 16-bit grey is rounded.
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 8192 * 8192  # of one image; Pillow itself refuses above 178,956,970
MIN_SIDE = 16  # pixels

# Pillow's decoders that may see data of unknown origin: EPS, for one, would start a program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")

# Why a record cannot be used. Counters have these keys, and logs and reports print them.
REASONS = {
    "empty": "there are no bytes",
    "not_an_image": f"it is none of {', '.join(FORMATS)}",
    "truncated": "it ends early",
    "damaged": "it does not decode",
    "too_many_pixels": "its header claims more pixels than allowed; it was not decoded",
    "too_small": "a side is below the minimum, or it would have to be enlarged",
    "unsupported_mode": "how its values make colours is not known",
    "unreadable": "the record could not be read",
    "bad_caption": "the captions beside it are not what they should be",
    "bad_latents": "its latents are not finite, or have another shape than was written down",
}

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")


class BadImage(ValueError):
    """A record cannot be used; `reason` is a key of REASONS, `detail` is for people."""

    key = ""  # the record's, where whoever raises this knows it

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail or REASONS[reason]}")
        self.reason = reason


def decode(
    data: bytes, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the pixels as the image is meant to be seen: upright, transparency on white.

    The size in the header is checked before any pixel is decoded. Raises BadImage.
    """
    image = _open(data, max_pixels, min_side)
    try:
        image.load()
        return np.array(_rgb(_upright(image)))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they stumble on
        raise _broken(data, error) from None


def size_of(data: bytes, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> tuple[int, int]:
    """Returns (height, width) of `decode`'s result from the header alone. Raises BadImage."""
    image = _open(data, max_pixels, min_side)
    width, height = image.size
    return (width, height) if _lies(image, data) else (height, width)


def cover_crop(
    image: UInt8[np.ndarray, "H W 3"],
    height: int,
    width: int,
    rng: np.random.Generator | None = None,
    *,
    flip: bool = False,
    resize: bool = True,
    upscale: bool = False,
) -> UInt8[np.ndarray, "height width 3"]:
    """Crops the largest part of the wanted aspect ratio and resizes it.

    Args:
      rng: decides where the part lies and whether it is mirrored; None: the centre, not mirrored.
      flip: mirror half of the images.
      resize: False crops exactly height x width, at the image's own scale.
      upscale: enlarge images that are too small, or else raise BadImage("too_small").
    """
    have_height, have_width = image.shape[:2]
    scale = max(height / have_height, width / have_width) if resize else 1.0
    if min(have_height / height, have_width / width) < 1 and not (upscale and resize):
        sizes = f"{have_width} x {have_height}, where {width} x {height} are needed"
        raise BadImage("too_small", sizes)
    x, y, mirror = rng.random(3) if rng is not None else (0.5, 0.5, 1.0)
    # the part's size; rounding must not lead out of the image
    part_width, part_height = min(width / scale, have_width), min(height / scale, have_height)
    left, top = x * (have_width - part_width), y * (have_height - part_height)
    if scale == 1.0:  # whole pixels: there is nothing to interpolate
        left, top = round(left), round(top)
        image = image[top : top + height, left : left + width]
    else:
        right, bottom = min(left + part_width, have_width), min(top + part_height, have_height)
        box = (left, top, right, bottom)
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
        image = np.asarray(resized)
    if flip and mirror < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def _open(data: bytes, max_pixels: int, min_side: int) -> Image.Image:
    """Opens an image by its header, and refuses one whose claimed size is too large."""
    image = _read_header(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height} are above {max_pixels} pixels")
    if min(width, height) < min_side:
        raise BadImage("too_small", f"{width} x {height}, where a side has at least {min_side}")
    return image


def _read_header(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", f"{error}") from None
    except Image.UnidentifiedImageError:
        if data.startswith(_SIGNATURES):
            raise BadImage("truncated", f"no header in {len(data)} bytes") from None
        raise BadImage("not_an_image", f"it begins with {data[:16]!r}") from None
    except MemoryError:
        raise
    except Exception as error:
        raise _broken(data, error) from None


def _broken(data: bytes, error: Exception) -> BadImage:
    """Tells truncated images from damaged ones, as far as the decoder does."""
    message = f"{error or type(error).__name__}"
    riff_size = 8 + int.from_bytes(data[4:8], "little") if data.startswith(b"RIFF") else 0
    early = isinstance(error, EOFError) or riff_size > len(data)
    return BadImage("truncated" if early or "truncated" in message.lower() else "damaged", message)


def _lies(image: Image.Image, data: bytes) -> bool:
    """Returns True if `_upright` will swap the sides of an image that is opened, not loaded."""
    if image.format == "TIFF":  # Pillow gives the size of what it will load
        return False
    if image.format == "PNG":
        # These may follow the pixels, and Pillow decodes an image to look for them.
        if not any(name in data for name in (b"eXIf", b"type exif", b"com.adobe.xmp")):
            return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:
        return False


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; an EXIF block that does not parse is ignored."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        pass
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Converts any image to three channels of 8 bits."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LA", "PA", "RGBA", "RGBa"):
        raise BadImage("unsupported_mode", f"Pillow's mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
