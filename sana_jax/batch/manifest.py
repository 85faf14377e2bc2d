"""manifest.jsonl, the record of a folder of pictures: one JSON object per line, one line a picture.

A line is written after its picture is complete. Its `key` is a hash of everything that decides the
pixels, up to rounding. (Rounding depends on the other prompts of the batch, since the longest
decides how many tokens are read, and on the version of JAX.)
"""

import errno
import hashlib
import json
import os
import threading
import time
from typing import Any

from etils import epath

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import is_local, write_atomically

UPLOAD_SECONDS = 10  # between two uploads, where a file cannot be appended to

Line = dict[str, Any]


def key_of(settings: dict[str, Any]) -> str:
    """Returns the hash of settings, independent of their order."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Manifest:
    """The lines of a manifest by their `file`. Threads may append."""

    def __init__(self, path: epath.Path):
        """Reads the file, if it exists. A torn last line of a killed run is left out."""
        self._path, self._lock = path, threading.Lock()
        self._uploaded, self._took = time.monotonic(), 0.0  # the last upload, in seconds
        self._content: bytes | None = path.read_bytes() if path.exists() else b""
        self.lines: dict[str, Line] = {}
        for number, text in enumerate(self._content.split(b"\n")[:-1], 1):
            if not text.strip(b"\0 \t\r"):  # an editor's empty line, or what a power cut left
                continue
            line = _parse(text)
            if line is None:
                raise UserError(f"{path} line {number} is not of this program; move the file away")
            self.lines[line["file"]] = line

    def tidy(self) -> None:
        """Rewrites the file so that it holds exactly `lines`."""
        content = b"".join(map(_encode, self.lines.values()))
        if content != self._content:
            write_atomically(self._path, content)
            self._content = content

    def sort(self) -> None:
        """Sorts the lines by picture, as an uninterrupted run leaves them."""
        self.lines = dict(sorted(self.lines.items()))
        self.tidy()

    def append(self, line: Line) -> None:
        """Adds the line of a complete picture. Raises OSError and leaves the file as it was."""
        with self._lock:
            if is_local(self._path):
                self._content = None  # no longer what the file holds
                self._append(_encode(line))
            self.lines[line["file"]] = line
            # Of a run of a million pictures too, uploads take a twentieth of the time at most.
            start, pause = time.monotonic(), max(UPLOAD_SECONDS, 20 * self._took)
            if not is_local(self._path) and start - self._uploaded > pause:
                self.tidy()
                self._uploaded = time.monotonic()
                self._took = self._uploaded - start

    def close(self) -> None:
        if not is_local(self._path):
            self.tidy()

    def _append(self, text: bytes) -> None:
        with open(self._path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise


def _encode(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    names = "file", "key", "sha256"
    known = isinstance(line, dict) and all(isinstance(line.get(name), str) for name in names)
    return line if known else None
