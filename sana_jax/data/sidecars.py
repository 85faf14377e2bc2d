"""The captions of a folder's images, from the files beside them.

    a.json          {"captions": [...], "scores": [...], "truth": ...}, or "caption" with one
    a.txt           one caption a line
    a.caption       likewise
    metadata.jsonl  a line an image, as Hugging Face's imagefolder has it: {"file_name": "a.png",
                    "text": ...}; the name is relative to the file's folder

The first that has captions is used. An image with several lines in metadata.jsonl has as many
captions. Other fields are ignored.
"""

import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

from sana_jax.data.images import BadImage
from sana_jax.data.records import captioned

TEXTS, METADATA = (".txt", ".caption"), "metadata.jsonl"
SUFFIXES = (".json", *TEXTS)
MAX_BYTES = 1 << 20  # of one file, or of one line of metadata.jsonl
COLUMNS = ("captions", "caption", "text", "prompt", "description")  # of metadata.jsonl


class NoCaptions(BadImage):
    """Whole JSON that has no captions where they would be; another file may have them."""


class Sidecars:
    """The captions of images, by their paths.

    Args:
      names: the paths of the files with captions, metadata.jsonl among them.
      open_file: opens a path of them for reading; it raises BadImage if there is none.

    `left_out` counts the files and lines that belong to no image, by what they are.
    """

    def __init__(
        self, names: Iterable[str], images: Iterable[str], open_file: Callable[[str], BinaryIO]
    ):
        names, images = sorted(names), set(images)
        self._open = open_file
        # By their names with the ending in lower case: cameras and Windows write IMG_1.TXT.
        self._files = {
            _lower_ending(name): name for name in names if posixpath.basename(name) != METADATA
        }
        self._lines: dict[str, list[tuple[str, int, int, int]]] = {}
        self.left_out: Counter[str] = Counter()
        for name in names:
            if posixpath.basename(name) == METADATA:
                self._index(name, images)
        stems = {name.rpartition(".")[0] for name in images}
        orphans = [name for name in self._files if name.rpartition(".")[0] not in stems]
        self.left_out["captions without an image"] = len(orphans)

    def __getitem__(self, image: str) -> dict[str, Any]:
        """Returns "captions", "scores" and "truth" of an image. Raises BadImage."""
        stem = image.rpartition(".")[0]
        fields: dict[str, Any] = {"captions": [], "scores": [], "truth": ""}
        without: BadImage | None = None
        if (name := self._files.get(f"{stem}.json")) is not None:
            try:
                fields |= _parse(self._read(name), name, ("captions", "caption"))
            except NoCaptions as error:
                without = error
            if fields["captions"]:
                return fields
        for ending in TEXTS:
            if (name := self._files.get(stem + ending)) is not None:
                # Not str.splitlines, which also cuts at form feeds and at Unicode's separators.
                lines = re.split(r"\r\n|\r|\n", self._read(name))
                if captions := [line.strip() for line in lines if line.strip()]:
                    return fields | {"captions": captions}
        found = [
            _parse(self._read(name, start, size), f"{name} line {number}", COLUMNS)
            for name, number, start, size in self._lines.get(image, ())
        ]
        for line in found:
            fields["captions"] = fields["captions"] + line.get("captions", [])
            fields["scores"] = fields["scores"] + line.get("scores", [])
            fields["truth"] = fields["truth"] or (line["truth"] if len(found) == 1 else "")
        if fields["scores"] and len(fields["scores"]) != len(fields["captions"]):
            raise BadImage("bad_caption", f"{found and METADATA}: some captions have no score")
        if without and not fields["captions"]:
            raise without
        return fields

    def _read(self, name: str, start: int = 0, size: int = MAX_BYTES + 1) -> str:
        with self._open(name) as file:
            if start:
                file.seek(start)
            data = file.read(size)
        if len(data) > MAX_BYTES:
            raise BadImage("bad_caption", f"{name} has more than {MAX_BYTES} bytes")
        try:
            if b"\0" not in data:  # as of UTF-16, or of a power cut
                return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
        raise BadImage("bad_caption", f"{name} is not UTF-8 text")

    def _index(self, name: str, images: set[str]) -> None:
        """Notes where the lines of a metadata.jsonl are, which may be larger than the memory."""
        folder, number, start = posixpath.dirname(name), 0, 0
        with self._open(name) as file:
            while line := file.readline(MAX_BYTES + 1):
                size = len(line)
                number += 1
                image = None
                while len(line) > MAX_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_BYTES + 1)
                    size += len(line)
                if size <= MAX_BYTES:
                    image = _file_name(line)
                image = image and posixpath.normpath(posixpath.join(folder, image))
                if image in images:
                    self._lines.setdefault(image, []).append((name, number, start, size))
                elif size > MAX_BYTES or line.strip():
                    known = "for no image" if image else "without a file_name"
                    self.left_out[f"lines of {name} {known}"] += 1
                start += size


def _file_name(line: bytes) -> str | None:
    try:
        name = json.loads(line.decode("utf-8-sig"))["file_name"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return name if isinstance(name, str) else None


def _lower_ending(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem + dot + ending.lower()


def _is_number(value) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # of an int that no float holds
        return False


def _parse(text: str, name: str, columns: tuple[str, ...]) -> dict[str, Any]:
    """Returns a record's fields from JSON whose captions are in the first of `columns` it has.

    JSON without captions, such as a downloader's metadata, has no "captions" in the result. Raises
    NoCaptions where they are null, or where the JSON is no object, such as a list of boxes.
    """

    def bad(reason: str, kind: type[BadImage] = BadImage) -> BadImage:
        return kind("bad_caption", f"{name}: {reason}")

    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise bad("no JSON object", NoCaptions)
        truth = values.get("truth", "")
        truth = truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True)
    except BadImage:
        raise
    except (ValueError, RecursionError) as error:
        raise bad(f"no JSON: {error}") from None
    there = [column for column in columns if column in values]
    if not there:
        return {"truth": truth}
    column = next((column for column in there if values[column] is not None), None)
    if column is None:
        raise bad(f"{there[0]!r} is null", NoCaptions)
    captions, scores = values[column], values.get("scores", [])
    if column != "captions":
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise bad(f"{column!r} is no {'list of strings' if column == 'captions' else 'string'}")
    if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
        raise bad('"scores" is no list of finite numbers')
    if scores and len(scores) != len(captions):
        raise bad(f"{len(captions)} captions but {len(scores)} scores")
    return captioned(captions, [float(score) for score in scores], truth)
