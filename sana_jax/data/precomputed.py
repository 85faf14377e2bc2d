"""Stored latents and caption embeddings, which training reads in place of images.

A folder holds one split:

    index.json                 source and settings, every shard, and records left out by reason
    shard-00000.array_record   records, packed by MessagePack, checked by ArrayRecord when read
    shard-00000.json           the shard's entry of the index, written when the shard is complete

A record has key, captions, scores and truth as in records.Record; `latents`, (h, w, c) in float32
or bfloat16; `scaled`, True if they are multiplied by the autoencoder's scaling factor already; and
optionally `embeddings`, for each caption the rows that its mask shows. index.json is written last:
a folder without it is unfinished.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from array_record.python import array_record_data_source, array_record_module
from flax import serialization

from sana_jax.data.begun import write_json
from sana_jax.data.images import BadImage
from sana_jax.data.records import NoData, Record
from sana_jax.data.shards import check_shards, damaged
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import check_is_file, check_readable

FORMAT = 1
INDEX = "index.json"
REMEDY = "run python -m sana_jax.precompute with the same arguments, which makes it anew"


class Precomputed:
    """The records of such a folder, or of its subfolder `split`; latents float32 and scaled.

    Attributes:
      index: index.json.
      shapes: (h, w) of every record's latents, int (N, 2).
      rows: text rows of the embeddings; None without embeddings.

    Raises UserError if the folder is missing, unfinished, or of another split.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        root = Path(folder).expanduser()
        self.folder = root / split if (root / split).is_dir() else root
        path = self.folder / INDEX
        self.index, text = _read_index(path)
        if self.index["split"] != split:
            raise UserError(
                f"precomputed:{folder} holds the split {self.index['split']!r}, not {split!r}:"
                f" precompute --split={split} to {root / split}, or for held-out data give"
                " config.loop.evaluate_every=0"
            )
        shards = [shard for shard in self.index["shards"] if shard["records"]]
        if not shards:
            raise damaged(path, "it names no records", REMEDY)
        for shard in shards:
            file = self.folder / shard["file"]
            if not os.path.isfile(file) or file.stat().st_size != shard["bytes"]:
                raise NoData(f"{file} is missing or incomplete; delete {INDEX} and run again")
        self._files = [str(self.folder / shard["file"]) for shard in shards]
        counts = [shard["records"] for shard in shards]
        check_shards(zip(self._files, counts, strict=True), REMEDY)
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]
        runs = [run for shard in shards for run in shard["runs"]]
        self.shapes = np.repeat([run[:2] for run in runs], [run[2] for run in runs], axis=0)
        text_settings = self.index["text"]
        self.rows = text_settings and text_settings["rows"]
        self._ends = np.cumsum(counts)
        self._data = array_record_data_source.ArrayRecordDataSource(self._files)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Record:
        try:
            record = serialization.msgpack_restore(self._bytes(index))
            latents = record["latents"].astype(np.float32)
            if not record.pop("scaled"):
                latents *= np.float32(self.index["scaling_factor"])
            key = record["key"]
        except (Retry, MemoryError):
            raise
        except Exception as error:  # ArrayRecord's, MessagePack's, and of another content
            bad = BadImage("unreadable", f"{type(error).__name__}: {error}")
            file, number = self._place(index)
            bad.key = f"{Path(file).name} record {number}"
            raise bad from None
        if latents.shape[:2] != tuple(self.shapes[index]) or not np.isfinite(latents).all():
            error = BadImage("bad_latents", f"latents of shape {latents.shape}")
            error.key = key
            raise error
        return record | {"latents": latents}

    def _bytes(self, index: int) -> bytes:
        """Returns a packed record; before it counts as bad, its file is opened and read again.

        ArrayRecord raises the same error for damage and for storage that was away, which is no
        reason to train on other records. Raises Retry if the file cannot be read at all.
        """
        try:
            return self._data[index]
        except (RuntimeError, ValueError):
            file, number = self._place(index)
            check_readable(file)
            return array_record_data_source.ArrayRecordDataSource([file])[number]

    def _place(self, index: int) -> tuple[str, int]:
        """Returns the file of a record and its number there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._files[shard], index - (int(self._ends[shard - 1]) if shard else 0)


def _read_index(path: Path) -> tuple[dict[str, Any], bytes]:
    """Returns an index whose fields are there and of their types, and its bytes."""
    check_is_file(path, str(path))
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise NoData(
            f"{path.parent} has no {INDEX}: it was not precomputed, or not to the end; run"
            " python -m sana_jax.precompute with the same arguments to finish it"
        ) from None
    except OSError as error:
        raise NoData(f"{path} cannot be read: {error}") from None
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error, REMEDY) from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path} is not of this version; precompute it anew")
    if not _is_whole(index):
        raise damaged(path, "fields are missing, or not what they should be", REMEDY)
    return index, text


def _is_whole(index: dict[str, Any]) -> bool:
    """Returns whether an index has the fields that are read, and shards whose numbers agree."""

    def counts(values: Any) -> bool:
        return all(type(value) is int and value > 0 for value in values)

    try:
        for shard in index["shards"]:
            runs, records, size = shard["runs"], shard["records"], shard["bytes"]
            if type(shard["file"]) is not str or type(size) is not int:
                return False
            if any(len(run) != 3 or not counts(run) for run in runs):
                return False
            if type(records) is not int or records != sum(run[2] for run in runs):
                return False
            if records > size:  # of a byte each at least, before memory is taken for them
                return False
        text, factor = index["text"], index["scaling_factor"]
        if text is not None and not counts([text["rows"]]):
            return False
        return isinstance(index["split"], str) and 0 < factor < float("inf")
    except (KeyError, TypeError):
        return False


class ShardWriter:
    """A context that writes one shard, which exists only after `finish` returns.

    `add` takes records with `latents`, `scaled` and optionally `embeddings`. What is not finished
    is in files whose names end with `part`.
    """

    def __init__(self, folder: Path, number: int, part: str = ".tmp"):
        self.path = folder / f"shard-{number:05d}.array_record"
        self._partial, self._part = self.path.with_suffix(part), part
        self._partial.unlink(missing_ok=True)
        self._writer = array_record_module.ArrayRecordWriter(str(self._partial), "group_size:1")
        self._runs: list[list[int]] = []  # [h, w, count] of records in a row with one shape

    def add(self, record: dict[str, Any]) -> None:
        shape = list(record["latents"].shape[:2])
        if not self._runs or self._runs[-1][:2] != shape:
            self._runs.append([*shape, 0])
        self._runs[-1][2] += 1
        self._writer.write(serialization.msgpack_serialize(record))

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Puts the shard in its place and returns its entry of the index, which includes `about`.

        Raises Retry if a record could not be written, OSError if another file cannot be.
        """
        try:
            self._writer.close()
        except RuntimeError as error:  # of any write before, by ArrayRecord's own threads
            raise Retry(f"{self._partial}: {error}") from error
        entry = {"file": self.path.name, "records": sum(run[2] for run in self._runs)} | about
        entry |= {"runs": self._runs, "bytes": 0, "sha256": None}
        if entry["records"]:  # ArrayRecord does not open a file without
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            entry["bytes"] = self._partial.stat().st_size
            self._partial.replace(self.path)
        write_json(self.path.with_suffix(".json"), entry, self._part)
        return entry

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        if self._writer.is_open():  # it was not finished
            with contextlib.suppress(RuntimeError):  # of a full disk; what ended us says more
                self._writer.close()
        self._partial.unlink(missing_ok=True)


def finished_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns the index's entry of a complete, undamaged shard, or None."""
    entry = entry_of(folder, number)
    try:
        if entry and entry["records"]:
            with (folder / entry["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return None
        return entry
    except (OSError, KeyError, TypeError):
        return None


def entry_of(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns the index's entry that was written with a shard, or None."""
    try:
        entry = json.loads((folder / f"shard-{number:05d}.json").read_bytes())
        return entry if isinstance(entry, dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def weights_sha256(config: Any, params: Any) -> str:
    """Returns a hash of a network's config and of its weights in float32.

    Files in bfloat16 and their copy in float32 have the same hash, whatever their layout.
    """
    digest = hashlib.sha256(repr(config).encode())
    if quantised := getattr(config, "quantised", ()):  # it is not in the repr, nor kinds in weights
        digest.update(repr(quantised).encode())
    for path, leaf in jax.tree.leaves_with_path(params):
        values = np.ascontiguousarray(np.asarray(leaf, np.float32))
        digest.update(f"{jax.tree_util.keystr(path)} {values.shape}\n".encode())
        digest.update(values)
    return digest.hexdigest()[:16]
