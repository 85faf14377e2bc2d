"""Reads what stands in a PNG file beside its pixels, which it does not decode.

A small file can hold very many pixels, and texts that are packed as tightly. This takes no memory
for either, and checksums tell whether a file is whole.
"""

import struct
import zlib
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BLOCK = 2**20  # bytes that are read at once
MAX_CHUNK = 2**24  # bytes of a text that is kept; prompts are shorter


class Png(NamedTuple):
    """What a file says of itself, up to where it breaks off."""

    texts: dict[str, str]  # those that are not packed, by their keywords
    size: tuple[int, int] | None  # height, width
    whole: bool  # every checksum is right, to the last


def read(file: BinaryIO) -> Png:
    """Reads a file from where it is. Raises OSError."""
    texts: dict[str, str] = {}
    size, kind = None, b""
    whole = file.read(len(SIGNATURE)) == SIGNATURE
    while whole and kind != b"IEND":
        head = file.read(8)
        whole = len(head) == 8
        if whole:
            length, kind = struct.unpack(">I4s", head)
            content, whole = _chunk(file, length, kind)
        if whole and kind == b"IHDR" and length == 13:
            width, height = struct.unpack(">II", content[:8])
            size = height, width
        if whole and kind in (b"iTXt", b"tEXt"):
            texts |= _text(kind, content)
    return Png(texts, size, whole)


def _chunk(file: BinaryIO, length: int, kind: bytes) -> tuple[bytes, bool]:
    """Returns a chunk's content, if it is kept, and True if its checksum is right."""
    kept = kind in (b"IHDR", b"iTXt", b"tEXt") and length <= MAX_CHUNK
    checksum, content = zlib.crc32(kind), bytearray()
    while length and (block := file.read(min(length, BLOCK))):
        checksum = zlib.crc32(block, checksum)
        length -= len(block)
        if kept:
            content += block
    return bytes(content), not length and file.read(4) == checksum.to_bytes(4, "big")


def _text(kind: bytes, content: bytes) -> dict[str, str]:
    keyword, _, text = content.partition(b"\0")
    if kind == b"iTXt":
        packed, text = text[:1] != b"\0", text[2:]
        _language, _, text = text.partition(b"\0")
        _translated, _, text = text.partition(b"\0")
        if packed:
            return {}
    encoding = "utf-8" if kind == b"iTXt" else "latin-1"
    return {keyword.decode("latin-1"): text.decode(encoding, "replace")}
