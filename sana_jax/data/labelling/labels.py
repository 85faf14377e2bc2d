"""Captions and scores for the records of another source, kept in a folder of their own.

    settings.json    everything that decides the labels, written first
    metadata.jsonl   a line a labelled record, in the order of the source
    index.json       the settings, what was counted, and the hash of the lines; written last

By the name captioned:DIR the folder is a source: the records of the other one that have a line,
with its captions. A line has the number of the record there, and else is as data/sidecars.py reads
it; so the file may also stand in a folder of images that has no other captions.

Lines are made in blocks of records. `metadata.jsonl.part` holds those of finished blocks and
`blocks.json` says which these are, so that a run that was killed goes on with the next block and
ends with the bytes of an unbroken one.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sana_jax.data.begun import begun, write_json
from sana_jax.data.records import NoData, Record, Source
from sana_jax.data.rejections import Counts, Rejection
from sana_jax.data.shards import damaged
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import absolute, is_local, read_json, sha256_of, storage

BLOCK = 1000  # records
FORMAT = 1
INDEX, LINES, BLOCKS = "index.json", "metadata.jsonl", "blocks.json"
REMEDY = "restore it, or run the command that made the folder into a new one"
FREE = "data", "data_dir"  # settings that say where the data is
PREFIX = "captioned:"


def source_settings(source: Source, data: str, split: str, data_dir: str | None, size: int) -> dict:
    """Returns the settings by which `Labelled` finds the source again."""
    where = {"data": _absolute_name(data), "split": split}
    where |= {"data_dir": data_dir and str(absolute(data_dir))}
    return where | {"size": size, "source": source.fingerprint, "records": len(source)}


def _absolute_name(data: str) -> str:
    """Returns the name of a source with absolute paths, as in webdataset:/a/0.tar::/a/1.tar."""
    if data == "shapes" or data.startswith("tfds:"):
        return data
    kind, paths = re.fullmatch(r"([a-z]+:(?!/))?(.*)", data, re.DOTALL).groups("")
    if os.path.exists(data) or not is_local(kind + paths):
        kind, paths = "", data
    return kind + "::".join(
        str(absolute(path)) if is_local(path) else path for path in paths.split("::")
    )


def line_of(number: int, key: str, captions: list[str], scores: list[float], truth: str) -> bytes:
    """Returns a record's line."""
    values = {"record": number, "file_name": key, "captions": captions, "scores": scores}
    return (json.dumps(values | ({"truth": truth} if truth else {})) + "\n").encode()


class LabelWriter:
    """Writes such a folder block by block; `begin` is the first record that is missing.

    Raises UserError if the folder was begun with other settings, or is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self._folder = folder
        settings = {"format": FORMAT, "block": BLOCK} | settings
        self._settings = begun(folder, settings, FREE) | {name: settings[name] for name in FREE}
        self._part = folder / f"{LINES}.part"
        self.index: dict[str, Any] | None = None  # of a finished folder
        self._blocks: list[dict[str, Any]] = []
        if (folder / INDEX).exists():
            self.index = read_json(folder / INDEX) | {name: settings[name] for name in FREE}
            self._put_in_place()
            check_lines(folder, self.index)
        else:
            self._recover()

    @property
    def begin(self) -> int:
        records = self._settings["records"]
        return records if self.index else min(len(self._blocks) * self.block, records)

    @property
    def block(self) -> int:
        return self._settings["block"]

    def total(self, name: str) -> int:
        """Returns the sum over all blocks of a number that `add` was given."""
        return sum(block[name] for block in self._blocks)

    def add(self, lines: list[bytes], rejections: Iterable[Rejection], **about: int) -> None:
        """Adds the next block: its lines, the records without, and numbers to add up.

        Raises UserError if it is the first and has no lines: something is wrong with all of them.
        """
        counts, content = Counts(), b"".join(lines)
        counts.add(len(lines), rejections)
        if not lines and not self._blocks:
            raise UserError(f"no picture can be used: {counts}; such as {counts.some_examples()}")
        with self._part.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        entry |= {"counts": counts.state(), "bad": counts.examples}
        self._blocks.append(entry | about)
        write_json(self._folder / BLOCKS, self._blocks)

    def finish(self) -> dict[str, Any]:
        """Writes the index and returns it; `begin` is the number of all records."""
        if self.index is not None:
            return self.index
        counts = sum((Counts.from_state(block["counts"]) for block in self._blocks), Counts())
        counts.hosts = 1  # not one a block
        bad = {key: why for block in self._blocks for key, why in block["bad"].items()}
        known = {"bytes", "sha256", "counts", "bad"}
        sums = {name: self.total(name) for name in self._blocks[0] if name not in known}
        self.index = self._settings | sums | {"counts": counts.state(), "bad": bad}
        self.index["sha256"] = sha256_of(self._part)
        self._put_in_place()
        return self.index

    def _put_in_place(self) -> None:
        """Writes the index and moves the lines; it goes on where it was killed."""
        write_json(self._folder / INDEX, self.index)
        if self._part.exists():
            self._part.replace(self._folder / LINES)
        (self._folder / BLOCKS).unlink(missing_ok=True)

    def _recover(self) -> None:
        """Finds the blocks that are whole, and cuts off what is behind them."""
        blocks, end = [], 0
        with contextlib.suppress(OSError, ValueError, RecursionError):
            blocks = json.loads((self._folder / BLOCKS).read_bytes())
        with self._part.open("ab+") as file:
            file.seek(0)
            for block in blocks:
                content = file.read(block["bytes"])
                if hashlib.sha256(content).hexdigest() != block["sha256"]:
                    break
                self._blocks.append(block)
                end += len(content)
            file.truncate(end)


def check_lines(folder: Path, index: dict[str, Any]) -> None:
    """Raises UserError if the lines of a finished folder are not those that were written."""
    try:
        found = sha256_of(folder / LINES)
    except OSError as error:
        raise damaged(folder / LINES, error, REMEDY) from None
    if found != index.get("sha256"):
        raise damaged(folder / LINES, "it was changed", REMEDY)


class Labelled:
    """The records of a source that have labels in a folder, or in its subfolder `split`.

    Args:
      open_source: opens the other source: data, split, data_dir, size.

    Attributes:
      index: index.json.

    Raises UserError if the folder is missing, unfinished or damaged, or the source has changed.
    """

    def __init__(self, folder: str, split: str, open_source: Callable[..., Source]):
        root = Path(folder).expanduser()
        self.folder = root / split if (root / split).is_dir() else root
        if not (self.folder / INDEX).is_file():
            raise NoData(
                f"{self.folder} has no {INDEX}: it is no folder of captions, or not finished; run"
                " the command that makes it, with the same arguments"
            )
        self.index = read_json(self.folder / INDEX)
        try:
            given = (self.index[name] for name in ("data", "split", "data_dir", "size"))
            data, its_split, data_dir, size = given
            fingerprint, kind = self.index["source"], self.index["format"]
        except KeyError as error:
            raise damaged(self.folder / INDEX, f"it has no {error}", REMEDY) from None
        if kind != FORMAT:
            raise UserError(f"{self.folder / INDEX} is not of this version; label it anew")
        if its_split != split:
            raise UserError(f"{PREFIX}{folder} holds the split {its_split!r}, not {split!r}")
        check_lines(self.folder, self.index)
        self._source = open_source(data, split, data_dir, size)
        if self._source.fingerprint != fingerprint:
            raise UserError(
                f"{data} has changed since {self.folder} was made from it: label it anew"
            )
        self._numbers, self._starts = _index(self.folder / LINES)
        digest = hashlib.sha256(f"{fingerprint}\n{self.index['sha256']}".encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        record = self._source[int(self._numbers[index])]
        with storage(self.folder), (self.folder / LINES).open("rb") as file:
            file.seek(self._starts[index])
            line = json.loads(file.readline())
        labels = {"captions": line["captions"], "scores": line["scores"]}
        return record | labels | {"truth": line.get("truth", "")}

    @property
    def places(self) -> list[tuple[str, int, int]] | None:
        """Where the other source's records are, those without labels included."""
        return getattr(self._source, "places", None)


def _index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of the record and the first byte of every line, int64."""
    numbers, starts, start = [], [], 0
    with path.open("rb") as file:
        for line in file:
            numbers.append(int(line[len(b'{"record": ') : line.index(b",")]))
            starts.append(start)
            start += len(line)
    return np.array(numbers, np.int64), np.array(starts, np.int64)


def with_styles(truth: str, own: int, styles: list[str]) -> str:
    """Returns a truth that names the styles of captions: of `own` as they are, then `styles`.

    Those of its own captions that it does not describe are called "own".
    """
    values: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(truth)
    values = values if isinstance(values, dict) else {}
    described = values.get("captions")
    if not isinstance(described, list) or len(described) != own:
        described = [{"style": "own"}] * own
    described = described + [{"style": style} for style in styles]
    return json.dumps(values | {"captions": described}, sort_keys=True)
