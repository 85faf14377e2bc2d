"""The captions of a folder's images, from the files beside them.

    a.json          {"captions": [...], "scores": [...], "truth": ...}, or "caption" with one
    a.txt           one caption a line
    a.caption       likewise
    metadata.jsonl  a line an image, as Hugging Face's imagefolder has it: {"file_name": "a.png",
                    "text": ...}; the name is relative to the file's folder
    metadata.csv    the same as a table whose first row has the names; "captions" and "scores" are
                    lists in JSON. A folder has one kind of metadata

The first that has captions is used. An image with several lines in the metadata has as many
captions. Other fields are ignored.
"""

import csv
import io
import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from sana_jax.data.images import BadImage
from sana_jax.data.records import captioned
from sana_jax.runtime.errors import UserError

TEXTS = (".txt", ".caption")
METADATA = LINES, TABLE = "metadata.jsonl", "metadata.csv"
SUFFIXES = (".json", *TEXTS)
MAX_BYTES = 1 << 20  # of one file, or of one line of metadata
COLUMNS = ("captions", "caption", "text", "prompt", "description")  # of metadata


class NoCaptions(BadImage):
    """Whole JSON that has no captions where they would be; another file may have them."""


class Sidecars:
    """The captions of images, by their paths.

    Args:
      names: the paths of the files with captions, those with metadata among them.
      open_file: opens a path of them for reading; it raises BadImage if there is none.

    `left_out` counts the files and lines that belong to no image, by what they are; `orphans` are
    such files. Raises UserError if there are both kinds of metadata.
    """

    def __init__(
        self, names: Iterable[str], images: Iterable[str], open_file: Callable[[str], BinaryIO]
    ):
        names, images = sorted(names), set(images)
        self._open = open_file
        metadata = [name for name in names if posixpath.basename(name) in METADATA]
        kinds = {posixpath.basename(name): name for name in metadata}
        if len(kinds) > 1:
            both = " and ".join(kinds[kind] for kind in METADATA)
            raise UserError(
                f"{both}: captions are read from one kind of metadata; remove the other"
            )
        # By their names with the ending in lower case: cameras and Windows write IMG_1.TXT.
        self._files = {_lower_ending(name): name for name in names if name not in metadata}
        self._lines: dict[str, list[tuple[str, int, int, int]]] = {}
        self._columns: dict[str, list[str]] = {}  # of each table
        self.left_out: Counter[str] = Counter()
        for name in metadata:
            self._index(name, images)
        stems = {name.rpartition(".")[0] for name in images}
        self.orphans = [
            name for key, name in self._files.items() if key.rpartition(".")[0] not in stems
        ]
        self.left_out["captions without an image"] = len(self.orphans)

    def __getitem__(self, image: str) -> dict[str, Any]:
        """Returns "captions", "scores" and "truth" of an image. Raises BadImage."""
        stem = image.rpartition(".")[0]

        def read(ending: str) -> tuple[str, str] | None:
            name = self._files.get(stem + ending)
            return name and (name, self._read(name))

        fields, without = beside(read)
        if fields["captions"]:
            return fields
        found = [
            self._line(name, number, start, size)
            for name, number, start, size in self._lines.get(image, ())
        ]
        for line in found:
            fields["captions"] = fields["captions"] + line.get("captions", [])
            fields["scores"] = fields["scores"] + line.get("scores", [])
            fields["truth"] = fields["truth"] or (line["truth"] if len(found) == 1 else "")
        if fields["scores"] and len(fields["scores"]) != len(fields["captions"]):
            raise BadImage(
                "bad_caption", f"{self._lines[image][0][0]}: some captions have no score"
            )
        if without and not fields["captions"]:
            raise without
        return fields

    def _line(self, name: str, number: int, start: int, size: int) -> dict[str, Any]:
        text, place = self._read(name, start, size), f"{name} line {number}"
        if name not in self._columns:
            return parse_json(text, place, COLUMNS)
        row = next(csv.reader(io.StringIO(text, newline="")))
        values: dict[str, Any] = dict(zip(self._columns[name], row, strict=False))
        for column in "captions", "scores":
            if column in values:
                try:
                    values[column] = json.loads(values[column] or "[]")
                except (ValueError, RecursionError):
                    raise BadImage("bad_caption", f"{place}: {column!r} is no list") from None
        return parse_fields(values, place, COLUMNS)

    def _read(self, name: str, start: int = 0, size: int = MAX_BYTES + 1) -> str:
        with self._open(name) as file:
            if start:
                file.seek(start)
            data = file.read(size)
        return decode_text(data, name)

    def _index(self, name: str, images: set[str]) -> None:
        """Notes where the lines of metadata are, which may be larger than the memory."""
        with self._open(name) as file:
            rows = _json_lines(file)
            if posixpath.basename(name) == TABLE:
                self._columns[name], rows = _table(file)
            for number, start, size, image in rows:
                if image is not None:
                    image = posixpath.normpath(posixpath.join(posixpath.dirname(name), image))
                if image in images and size <= MAX_BYTES:
                    self._lines.setdefault(image, []).append((name, number, start, size))
                else:
                    known = "for no image" if image else "without a file_name"
                    self.left_out[f"lines of {name} {known}"] += 1


def beside(
    read: Callable[[str], tuple[str, str] | None],
    columns: tuple[str, ...] = ("captions", "caption"),
) -> tuple[dict[str, Any], BadImage | None]:
    """Returns the fields of the first file beside an image that has captions.

    Args:
      read: returns the name and the text of the file with an ending of SUFFIXES, None without.
      columns: what the captions may be called in .json, most telling first.

    Without captions there are an empty list and, if JSON has none where they would be, that error.
    Raises BadImage.
    """
    fields: dict[str, Any] = {"captions": [], "scores": [], "truth": ""}
    without: BadImage | None = None
    if (found := read(".json")) is not None:
        name, text = found
        try:
            fields |= parse_json(text, name, columns)
        except NoCaptions as error:
            without = error
        if fields["captions"]:
            return fields, None
    for ending in TEXTS:
        if (found := read(ending)) is not None:
            # Not str.splitlines, which also cuts at form feeds and at Unicode's separators.
            lines = re.split(r"\r\n|\r|\n", found[1])
            if captions := [line.strip() for line in lines if line.strip()]:
                return fields | {"captions": captions}, None
    return fields, without


def decode_text(data: bytes, name: str) -> str:
    """Returns the text of a file with captions. Raises BadImage if it is long, or not UTF-8."""
    if len(data) > MAX_BYTES:
        raise BadImage("bad_caption", f"{name} has more than {MAX_BYTES} bytes")
    try:
        if b"\0" not in data:  # as of UTF-16, or of a power cut
            return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise BadImage("bad_caption", f"{name} is not UTF-8 text")


Rows = Iterator[tuple[int, int, int, str | None]]  # number, first byte, bytes, file_name


def _json_lines(file: BinaryIO) -> Rows:
    """Yields the lines that are not blank; one that is too long has no file_name."""
    number = start = 0
    while line := file.readline(MAX_BYTES + 1):
        size = len(line)
        number += 1
        while len(line) > MAX_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_BYTES + 1)
            size += len(line)
        if size > MAX_BYTES or line.strip():
            yield number, start, size, None if size > MAX_BYTES else _file_name(line)
        start += size


def _table(file: BinaryIO) -> tuple[list[str], Rows]:
    """Returns the names of a table's columns and its other rows, which may have several lines."""
    lines = read = 0

    def texts() -> Iterator[str]:
        nonlocal lines, read
        while line := file.readline(MAX_BYTES + 1):
            lines, read = lines + 1, read + len(line)
            yield line.decode("utf-8-sig", errors="replace")

    reader = csv.reader(texts())

    def row() -> list[str]:
        try:
            return next(reader)
        except csv.Error:  # of a field that is too long: a quotation mark has no other
            return [""]

    try:
        columns = row()
    except StopIteration:
        columns = []

    def rows() -> Rows:
        while True:
            number, start = lines + 1, read
            try:
                values = row()
            except StopIteration:
                return
            if values:
                found = dict(zip(columns, values, strict=False)).get("file_name")
                yield number, start, read - start, found or None

    return columns, rows()


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


def parse_json(text: str, name: str, columns: tuple[str, ...]) -> dict[str, Any]:
    """Returns a record's fields from JSON whose captions are in the first of `columns` it has.

    JSON without captions, such as a downloader's metadata, has no "captions" in the result. Raises
    NoCaptions where they are null, or where the JSON is no object, such as a list of boxes.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadImage("bad_caption", f"{name}: no JSON: {error}") from None
    if not isinstance(values, dict):
        raise NoCaptions("bad_caption", f"{name}: no JSON object")
    return parse_fields(values, name, columns)


def parse_fields(values: dict[str, Any], name: str, columns: tuple[str, ...]) -> dict[str, Any]:
    """Returns what `parse_json` does, from values that are parsed. Raises BadImage."""

    def bad(reason: str, kind: type[BadImage] = BadImage) -> BadImage:
        return kind("bad_caption", f"{name}: {reason}")

    try:
        truth = values.get("truth", "")
        truth = truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True)
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
