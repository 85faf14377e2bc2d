"""manifest.jsonl, the record of a folder of pictures: one JSON object per line, one line a picture.

A line is written after its picture is complete. Its `key` is a hash of everything that decides the
pixels, up to rounding. (Rounding depends on the other prompts of the batch, since the longest
decides how many tokens are read, and on the version of JAX.)

A file that a power cut or another system has changed is read as far as it is whole: JSON escapes
line ends and NULs, so these only ever stand between lines. Pictures that lose their line prove
themselves by their header, or are drawn again.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from sana_jax.runtime.files import is_local, parse_json, write_atomically

UPLOAD_SECONDS = 10  # between two uploads, where a file cannot be appended to

MAX_LEVELS = 32  # of lists and objects in a line; JSON's writer ends at Python's own limit
ASIDE = ".aside"  # ends the name of the file that takes what is no line of this program

Line = dict[str, Any]


def key_of(settings: dict[str, Any]) -> str:
    """Returns the hash of settings, independent of their order."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Manifest:
    """The lines of a manifest by their `file`. Threads may append."""

    def __init__(self, path: epath.Path):
        """Reads the file, if it exists. A torn last line of a killed run is left out.

        Other text that is no line of this program is in `strange`.
        """
        self._path, self._lock = path, threading.Lock()
        self._uploaded, self._took = time.monotonic(), 0.0  # the last upload, in seconds
        self._content: bytes | None = path.read_bytes() if path.exists() else b""
        self.lines: dict[str, Line] = {}
        self.strange: list[bytes] = []
        found = list(_pieces(self._content))
        for line, text in found:
            if line is None:
                self.strange.append(text)
            else:
                self.lines[line["file"]] = line
        if self.strange and self.strange[-1] is found[-1][1] and _is_torn(self._content):
            self.strange.pop()

    def set_aside(self) -> None:
        """Keeps what is strange in a file of its own, and says so; `tidy` then removes it."""
        if not self.strange:
            return
        aside = self._path.with_name(self._path.name + ASIDE)
        kept = aside.read_bytes() if aside.exists() else b""
        write_atomically(aside, kept + b"".join(text + b"\n" for text in self.strange))
        count = f"{len(self.strange)} line{'s' * (len(self.strange) > 1)}"
        print(
            f"{self._path}: what is not whole, or not of this program, is in {aside.name} now"
            f" ({count}); pictures of such lines prove themselves, or are drawn again",
            file=sys.stderr,
        )
        self.strange = []

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


def _pieces(content: bytes) -> Iterator[tuple[Line | None, bytes]]:
    """Yields every line with its text; None for the line where the text is of another shape."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Windows' shell copies
        content = content.decode("utf-16", "replace").encode("utf-8", "replace")
    for text in re.split(rb"[\r\n\0]+", content):
        line = _parse(text)
        # Of two that lost the end between them, each may still be whole.
        for part in [text] if line else re.split(rb'(?=\{"file": ")', text):
            if part.strip():
                yield line or _parse(part), part


def _is_torn(content: bytes) -> bool:
    """Returns True if the last line lacks its end, and is the beginning of one of this program."""
    start, last = b'{"file": "', content[content.rfind(b"\n") + 1 :]
    return last.startswith(start) or bool(last) and start.startswith(last)


def _parse(text: bytes) -> Line | None:
    try:
        line = parse_json(text, MAX_LEVELS)
    except ValueError:
        return None
    names = "file", "key", "sha256"
    known = isinstance(line, dict) and all(isinstance(line.get(name), str) for name in names)
    return line if known else None
