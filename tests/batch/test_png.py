"""What stands in a PNG beside its pixels, of whole files and of those that are not."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_jax.batch import png


def encoded(**texts: str) -> bytes:
    info, content = PngInfo(), io.BytesIO()
    for keyword, text in texts.items():
        info.add_itxt(keyword, text)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG", pnginfo=info)
    return content.getvalue()


def read(content: bytes) -> png.Png:
    return png.read(io.BytesIO(content))


def test_texts_and_size_are_those_of_pillow():
    content = encoded(prompt="é🎨\n", seed="3", empty="", long="é" * 10**6)
    found = read(content)
    with Image.open(io.BytesIO(content)) as image:
        assert found.texts == image.text and found.size == image.size[::-1] and found.whole
    info, content = PngInfo(), io.BytesIO()
    info.add_text("latin", "é")
    info.add_itxt("packed", "é", zip=True)
    Image.new("RGB", (3, 2)).save(content, "PNG", pnginfo=info)
    assert read(content.getvalue()) == ({"latin": "é"}, (2, 3), True)


def test_a_file_that_is_torn_or_changed_at_any_byte_is_not_whole():
    content = encoded(seed="3")
    assert read(content).whole and read(content + b"more").whole
    for i in range(len(content)):
        assert not read(content[:i]).whole
        changed = bytearray(content)
        changed[i] ^= 1 << i % 8
        assert not read(bytes(changed)).whole
        assert not read(content[:i] + bytes(len(content) - i)).whole


def test_a_length_without_content_takes_no_memory():
    head = png.SIGNATURE + struct.pack(">I4s", 2**32 - 1, b"iTXt")
    assert read(head + b"a") == ({}, None, False)
    longest = struct.pack(">I4s", png.MAX_CHUNK + 1, b"iTXt")
    body = bytes(png.MAX_CHUNK + 1)
    check = zlib.crc32(b"iTXt" + body).to_bytes(4, "big")
    assert read(png.SIGNATURE + longest + body + check).texts == {}
