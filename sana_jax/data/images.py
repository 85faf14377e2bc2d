"""Decodes the images of found folders to pixels, or says why an image cannot be used.

Pixels are sRGB as stored: colour profiles are not applied. Only the first of several frames or
pages is read. 16-bit colour loses its low byte in Pillow's decoder; 16-bit grey is rounded.
"""

import contextlib
import io
import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

from sana_jax.pictures import MODES, is_opaque, on_white

MAX_PIXELS = 8192 * 8192  # of one image, unless told otherwise
MOST_PIXELS = 178_956_970  # that the limit of an image can be raised to: Pillow's own
MIN_SIDE = 16  # pixels
# That all threads decode at once: two of the largest images, or one that is transparent, which has
# more copies. At 15 and 30 bytes a pixel these are 2 GB.
PIXELS_AT_ONCE = 2 * MAX_PIXELS

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
    "not_described": "no model described it",
    "low_score": "no caption of it has the score that is asked for",
}

# Chunks of a PNG that a decoder may leave out, but whose content changes what `decode` returns or
# says; and texts, of which those with one of these keywords say which way up the image is.
_PNG = b"\x89PNG\r\n\x1a\n"
_READ = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"cHRM", b"sRGB", b"pHYs")
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED = (b"exif", b"xmp", b"Raw profile type exif", b"XML:com.adobe.xmp")

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
    with decoded(data, max_pixels, min_side) as pixels:
        return pixels


@contextlib.contextmanager
def decoded(
    data: bytes, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yields what `decode` returns, for a block that makes something smaller of it.

    Large images wait here until other threads' blocks have ended. Such blocks are not nested.
    """
    image = _open(data, max_pixels, min_side)
    share = image.width * image.height * (2 if image.has_transparency_data else 1)
    with _ROOM.taken(share):
        pixels = _decode(image, data)
        del image  # it has as many bytes again
        yield pixels


def _decode(image: Image.Image, data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    try:
        image.load()
        return np.array(_rgb(_upright(image)))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they stumble on
        raise _broken(data, error) from None


class Room:
    """Space that threads share; who asks for more than all of it gets it alone."""

    def __init__(self, size: int):
        self._size, self._used = size, 0
        self._changed, self._turn = threading.Condition(), threading.Lock()

    @contextlib.contextmanager
    def taken(self, share: int) -> Iterator[None]:
        """Waits until there is room for `share`, in turn, and keeps it while the block runs."""
        share = min(share, self._size)
        with self._turn, self._changed:  # in turn, or small ones would pass a large one for ever
            self._changed.wait_for(lambda: self._used + share <= self._size)
            self._used += share
        try:
            yield
        finally:
            with self._changed:
                self._used -= share
                self._changed.notify_all()


_ROOM = Room(PIXELS_AT_ONCE)


def size_of(data: bytes, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> tuple[int, int]:
    """Returns (height, width) of `decode`'s result from the header alone. Raises BadImage."""
    image = _open(data, max_pixels, min_side)
    width, height = image.size
    return (width, height) if _lies(image, data) else (height, width)


def shows_through(data: bytes) -> bool:
    """Returns True if a pixel of an image that `decode` takes is not opaque."""
    image = _open(data, MAX_PIXELS, 1)
    return image.has_transparency_data and (image.mode not in MODES or not is_opaque(image))


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
    if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        # Pillow spreads pixels of 2 and 4 bits over 0 .. 255, and leaves this value as it is.
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(image.tile[0].args, 1)
    if image.mode == "P" and image.palette is None:
        raise BadImage("damaged", "it has no palette")
    return image


def _read_header(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty")
    try:
        return Image.open(io.BytesIO(_without_notes(data)), formats=FORMATS)
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


def _without_notes(data: bytes) -> bytes:
    """Returns a PNG without the chunks that `decode` does not read; other data as it is.

    Pillow refuses an image whose notes or colour profile are long, as editors write them.
    """
    if not data.startswith(_PNG):
        return data
    kept, start, place = [], 0, len(_PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data):
            break  # it is cut short here, which the decoder shall see
        if kind in _TEXT:
            is_read = _says_orientation(kind, data[place + 8 : end - 4])
        else:
            is_read = kind[:1].isupper() or kind in _READ  # a capital: it may not be left out
        if not is_read:
            kept.append(data[start:place])
            start = end
        place = end
        if kind == b"IEND":
            break
    return b"".join([*kept, data[start:]]) if start else data


def _says_orientation(kind: bytes, content: bytes) -> bool:
    """Returns whether Pillow would find which way is up in a PNG's text, and not refuse it."""
    keyword, _, text = content.partition(b"\0")
    if keyword not in _ORIENTED:
        return False
    if kind == b"zTXt":
        packed = text[1:]  # after the method
    elif kind == b"iTXt" and text[:1] == b"\1":
        packed = text[2:].split(b"\0", 2)[-1]  # after flag, method, language and translation
    else:
        return len(text) <= MAX_TEXT_MEMORY
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed, MAX_TEXT_CHUNK)
    except zlib.error:  # Pillow ignores it
        return True
    return not unpacker.unconsumed_tail


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
    share = image.width * image.height if image.format == "PNG" else 0
    try:
        with _ROOM.taken(share):
            return image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
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
        pixels = ((grey + 128) // 257).astype(np.uint8)
        pixels[grey == image.info.get("transparency", -1)] = 255
        return Image.fromarray(pixels).convert("RGB")
    if image.mode not in MODES:
        raise BadImage("unsupported_mode", f"Pillow's mode {image.mode}")
    return on_white(image)
