"""Parquet files with pictures as a source, as Hugging Face's `datasets` and pyarrow write them.

    parquet:DIR, parquet:FILE, parquet:DIR/*.parquet and the other forms of archives.py

A row is a record, called FILE/ROW/NAME. Columns are matched by their names (tfds_source.py has the
list): the picture is encoded, as bytes or as `datasets` has it, {"bytes": ..., "path": ...}, whose
path is NAME; captions are one text or a list of texts, with "scores" and "truth" beside them.

Parquet is read by row groups, which a shuffle reads whole for one of their rows; the last few are
kept. `datasets` writes 100 rows a group. For a long training `precompute`, or write smaller groups.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from etils import epath

from sana_jax.data import archives, sidecars
from sana_jax.data.folder import MAX_BYTES
from sana_jax.data.images import BadImage
from sana_jax.data.records import NoData, Record
from sana_jax.data.tfds_source import CAPTION_NAMES, IMAGE_NAMES, KEY_NAMES
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import reason_of

KEPT_BYTES = 128 << 20  # of row groups, and one more
LARGE_GROUP = 64 << 20  # bytes, from which on a line says so
REMEDY = "download or make it again"
_OWN = "_kept", "_lock"  # of one process


class Parquet:
    """The rows of Parquet files.

    Raises NoData if there is no file, UserError for one that is damaged, has no pictures, or has
    other columns than the first.
    """

    def __init__(self, spec: str, split: str = "train"):
        self._files = archives.of_split(archives.find(spec, ".parquet"), spec, split)
        found = [_metadata(archive.path) for archive in self._files]
        self._about, schemas = [about for about, _ in found], [schema for _, schema in found]
        self._columns = _columns(schemas[0], self._files[0].path)
        for archive, schema in zip(self._files, schemas, strict=True):
            if missing := [name for name in self._columns.values() if name not in schema.names]:
                raise UserError(
                    f"{archive.path} has no column {missing[0]!r}, which {self._files[0].name} has"
                )
            image = pa.schema([schema.field(self._columns["image"])])
            _columns(image, archive.path)  # raises if they are no pictures in this file
        groups = [
            (file, group, about.row_group(group).num_rows)
            for file, about in enumerate(self._about)
            for group in range(about.num_row_groups)
        ]
        self._groups = [(file, group) for file, group, _ in groups]
        self._ends = np.cumsum([rows for _, _, rows in groups], dtype=np.int64)
        if not groups or not len(self):
            raise NoData(f"{spec}: its {len(self._files)} files have no rows")
        self._first = np.cumsum([0, *(about.num_rows for about in self._about)])
        self.listing = json.dumps(
            [
                [archive.name, about.num_rows, archive.path.stat().length]
                for archive, about in zip(self._files, self._about, strict=True)
            ]
        )
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        self._check_pictures(spec)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, record: int) -> Record:
        if not 0 <= record < len(self):
            raise IndexError(record)
        group = int(np.searchsorted(self._ends, record, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        try:
            (row,) = self._table(group).slice(record - start, 1).to_pylist()
        except BadImage as error:
            error.key = self.key_of(record)
            raise
        picture, name = row.pop(self._columns["image"]), row.get(self._columns.get("key", ""))
        if isinstance(picture, dict):
            name, picture = picture.get("path"), picture.get("bytes")
        key = self.key_of(record) + (f"/{str(name).lstrip('/')}" if name else "")
        try:
            if picture is None:
                raise BadImage("unreadable", "it has no picture" + ", only its path" * bool(name))
            if len(picture) > MAX_BYTES:
                raise BadImage("unreadable", f"it has more than {MAX_BYTES >> 20} MiB")
            texts = {self._columns.get("caption", ""), "scores", "truth"}
            given = {name: value for name, value in row.items() if name in texts}
            return {"key": key, "image": picture, **_captions(given, self._columns)}
        except BadImage as error:
            error.key = key
            raise

    def key_of(self, record: int) -> str:
        """Returns what a record's key begins with: its file and its row there."""
        file = int(np.searchsorted(self._first, record, side="right")) - 1
        return f"{self._files[file].name}/{record - int(self._first[file])}"

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """The files that the records are in, and the rows there."""
        return [
            (os.path.realpath(archive.path), 0, about.num_rows)
            for archive, about in zip(self._files, self._about, strict=True)
        ]

    def _table(self, group: int) -> pa.Table:
        """Returns the columns that are read of a row group. Raises BadImage, and Retry."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
        file, number = self._groups[group]
        path = self._files[file].path
        try:
            with path.open("rb") as opened:
                reader = pq.ParquetFile(opened, metadata=self._about[file])
                table = reader.read_row_group(number, [*dict.fromkeys(self._columns.values())])
        except pa.ArrowException as error:
            raise BadImage("unreadable", f"its row group is damaged: {error}") from None
        except OSError as error:
            if error.errno is None:  # of Arrow, for pages that do not unpack
                raise BadImage("unreadable", f"its row group is damaged: {error}") from None
            raise Retry(f"{path}: {reason_of(error)}; try again") from None
        with self._lock:
            self._kept[group] = table
            while sum(each.nbytes for each in self._kept.values()) > KEPT_BYTES:
                if len(self._kept) == 1:
                    break
                self._kept.popitem(last=False)
        return table

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another process needs, which reads its own row groups."""
        return {name: value for name, value in vars(self).items() if name not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _kept=OrderedDict(), _lock=threading.Lock())

    def _check_pictures(self, spec: str) -> None:
        """Raises UserError if there are paths of pictures alone; says if row groups are large.

        The groups are read until one has a picture: Arrow's statistics of a column end the process
        where they are damaged.
        """
        name = self._columns["image"]
        for group in range(len(self._groups)):
            try:
                table = self._table(group)
            except BadImage:
                return  # its rows will say so
            parts = table[name].chunks  # of 2 GiB at most
            if pa.types.is_struct(table[name].type):
                parts = [part.field("bytes") for part in parts]
            if any(part.null_count < len(part) for part in parts):
                break
        else:
            raise UserError(
                f"{spec}: column {name!r} has the paths of pictures and not their bytes; before"
                " datasets writes them, call .with_format('arrow').map("
                "datasets.table.embed_table_storage, batched=True)"
            )
        if table.nbytes > LARGE_GROUP:
            logging.warning(
                "%s: a row group has %d MB, which a shuffle reads for every row; write it with"
                " row_group_size=10, or precompute it",
                spec,
                table.nbytes // 10**6,
            )


def _metadata(path: epath.Path) -> tuple[pq.FileMetaData, pa.Schema]:
    try:
        with path.open("rb") as file:
            about = pq.read_metadata(file)
        return about, about.schema.to_arrow_schema()
    except FileNotFoundError:
        raise NoData(f"{path}: there is no such file") from None
    except (pa.ArrowException, ValueError, OSError) as error:  # ValueError: of names in no UTF-8
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is cut short or damaged ({reason:.200}); {REMEDY}") from None


def _columns(schema: pa.Schema, path: epath.Path) -> dict[str, str]:
    """Returns what the columns are called that hold the image, the caption and the rest."""

    def is_picture(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and is_picture(field.type) for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_text(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_text(kind.value_type)
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    pictures = [field.name for field in schema if is_picture(field.type)]
    texts = [field.name for field in schema if is_text(field.type)]
    image = _first((*IMAGE_NAMES, *pictures), pictures)
    if image is None:
        raise UserError(
            f"{path} has no column with the bytes of pictures, only {', '.join(schema.names):.500}"
        )
    found = {
        "image": image,
        "caption": _first(CAPTION_NAMES, texts),
        "key": _first(KEY_NAMES, schema.names),
        "scores": _first(("scores",), schema.names),
        "truth": _first(("truth",), texts),
    }
    return {what: name for what, name in found.items() if name is not None}


def _first(wanted: Iterable[str], there: list[str]) -> str | None:
    return next((name for name in wanted if name in there), None)


def _captions(given: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Returns a record's captions, scores and truth. Raises BadImage."""
    captions = given.get(columns.get("caption", "")) or []
    values = {
        "captions": [captions] if isinstance(captions, str) else captions,
        "scores": given.get("scores") or [],
        "truth": given.get("truth") or "",
    }
    return sidecars.parse_fields(values, "its row", ("captions",))
