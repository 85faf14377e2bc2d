"""Files as they are found in folders of images: odd but good ones, and ones that cannot be used."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from sana_jax.data.loader import attempt_record
from sana_jax.data.rejections import Counts, Rejection

WIDTH, HEIGHT = 48, 40
TURNED_RIGHT = 6  # EXIF: to be turned by 90 degrees clockwise


def picture(seed: int = 0) -> np.ndarray:
    """Smooth colours, in which no two corners are alike: uint8 (HEIGHT, WIDTH, 3)."""
    corners = np.random.default_rng(seed).permutation(np.linspace(20, 230, 12)).reshape(2, 2, 3)
    image = Image.fromarray(corners.astype(np.uint8)).resize((WIDTH, HEIGHT), 2)
    return np.array(image)


def encode(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with hardly any data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def sixteen_bit_png(grey: np.ndarray) -> bytes:
    return encode(Image.fromarray(grey.astype(np.uint16)), "PNG")


def turned_jpeg() -> bytes:
    """Stored lying, to be seen upright."""
    exif = Image.Exif()
    exif[0x0112] = TURNED_RIGHT
    lying = np.rot90(picture(), 1)
    return encode(np.ascontiguousarray(lying), "JPEG", quality=98, subsampling=0, exif=exif)


def frames(kind: str) -> bytes:
    """An animation; the first frame is `picture()`."""
    first, *rest = [Image.fromarray(picture(seed)) for seed in range(3)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    return encode(first, kind, save_all=True, append_images=rest, duration=100, **lossless)


def usable() -> dict[str, bytes]:
    image = Image.fromarray(picture())
    grey = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 34
    half = image.convert("RGBA")
    half.putalpha(128)
    return {
        "plain.png": encode(image, "PNG"),
        "plain.jpg": encode(image, "JPEG"),
        "progressive.JPG": encode(image, "JPEG", progressive=True),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG", quality=98),
        "rgba.png": encode(half, "PNG"),
        "rgba.webp": encode(half, "WEBP", lossless=True),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "grey_alpha.png": encode(image.convert("LA"), "PNG"),
        "one_bit.png": encode(image.convert("1"), "PNG"),
        "palette.png": encode(image.quantize(64), "PNG"),
        "palette_clear.png": encode(image.quantize(64), "PNG", transparency=0),
        "sixteen_bit.png": sixteen_bit_png(grey),
        "turned.jpg": turned_jpeg(),
        "animated.gif": frames("GIF"),
        "animated.webp": frames("WEBP"),
        "animated.png": frames("PNG"),
        "plain.bmp": encode(image, "BMP"),
        "lzw.tiff": encode(image, "TIFF", compression="tiff_lzw"),
        "really_a_png.jpg": encode(image, "PNG"),
    }


def unusable() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, reason)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg, png = encode(noise, "JPEG"), encode(noise, "PNG")
    webp, gif = encode(noise, "WEBP"), encode(noise, "GIF")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    return {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "pointer.png": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "not_an_image",
        ),
        "zeros.jpg": (bytes(5000), "not_an_image"),
        "postscript.jpg": (encode(noise, "EPS"), "not_an_image"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "half.webp": (webp[: len(webp) // 2], "truncated"),
        "half.gif": (gif[: len(gif) // 2], "truncated"),
        "header.png": (png[:20], "truncated"),
        "header.jpg": (jpeg[:10], "truncated"),
        "flipped.png": (bytes(flipped), "damaged"),
        "bomb_400mp.png": (png_of_size(20000, 20000), "too_many_pixels"),
        "bomb_100mp.png": (png_of_size(10000, 10000), "too_many_pixels"),
        "bomb_69mp.png": (png_of_size(8300, 8300), "too_many_pixels"),
        "one_pixel.png": (encode(noise[:1, :1], "PNG"), "too_small"),
        "line.png": (encode(np.zeros((1, 10000, 3), np.uint8), "PNG"), "too_small"),
        "float.tiff": (encode(Image.new("F", (64, 64)), "TIFF"), "unsupported_mode"),
        "ints.tiff": (encode(Image.new("I", (64, 64)), "TIFF"), "unsupported_mode"),
        "lab.tiff": (encode(Image.new("LAB", (64, 64)), "TIFF"), "unsupported_mode"),
    }


def counts_of(source, transform) -> Counts:
    """What becomes of every record, read once."""
    counts = Counts()
    for index in range(len(source)):
        found = attempt_record(source, index, transform, np.random.default_rng((0, index)))
        counts.add(*((0, [found]) if isinstance(found, Rejection) else (1, [])))
    return counts
