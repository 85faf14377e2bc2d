#!/usr/bin/env bash
# Pillow 13.0.0 (Python 3.11): the transparent colour of a grey PNG of 2 or 4 bits a pixel is lost. Pixels are spread over
# 0 .. 255, but the colour that the tRNS chunk names is kept as it is in the file, so convert("RGBA") finds no pixel of it.
#
# Valid input: a 4 x 1 picture of the greys 0, 1, 2, 3 with two bits each, of which tRNS says that 1 is transparent.
# Seen: pixels [0, 85, 170, 255], transparency 1, alpha [255, 255, 255, 255]; the PNG specification asks for the second
# pixel to be transparent. A training that puts pictures on white paints these areas grey.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q 'pillow==13.0.0'
cat > "$folder/look.py" <<'PYTHON'
import io
import struct
import zlib

from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


row = bytes([0, 0b00_01_10_11])  # the filter, then four pixels
png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0))
png += chunk(b"tRNS", struct.pack(">H", 1)) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
image = Image.open(io.BytesIO(png))
print("pixels", [image.convert("L").getpixel((x, 0)) for x in range(4)], end=", ")
print("transparency", image.info["transparency"], end=", ")
print("alpha", [image.convert("RGBA").getpixel((x, 0))[3] for x in range(4)])
PYTHON
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/out"
grep -q "alpha \[255, 255, 255, 255\]" "$folder/out"
