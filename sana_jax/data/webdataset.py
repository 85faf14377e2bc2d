"""Tars of pictures as a source: WebDataset's shards, with or without the index that wids makes.

    webdataset:DIR                  all tars below, or those that DIR/wids-meta.json lists
    webdataset:DIR/wids-meta.json   those that an index lists
    webdataset:DIR/{000..012}.tar   and the other forms of archives.py

Every picture is a record, called SHARD/MEMBER. Its captions are in the members of the same name
with another ending (tar_index.py; sidecars.py says what they hold): in JSON also as "prompt", as
SANA's own code has it. Beside SHARD.tar that code keeps more captions and their scores, by the
names of the samples:

    SHARD_InternVL2-26B.json             {"0001": {"InternVL2-26B": "a cat on a mat"}, ...}
    SHARD_InternVL2-26B_clip_score.json  {"0001": {"InternVL2-26B": "27.10"}, ...}

The kinds of captions there ("prompt" for the record's own) are their styles, for
config.data.captions.proportions. A caption without a score where others have one has 0 points.
"""

import collections
import json
import os
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from sana_jax.data import archives, sidecars, tar_index
from sana_jax.data.images import BadImage
from sana_jax.data.records import NoData, Record
from sana_jax.data.shard_captions import ShardCaptions, beside_tar
from sana_jax.data.tar_index import TarIndex
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import named, reason_of
from sana_jax.runtime.progress import Progress

INDEX = "wids-meta.json"


class Tars:
    """The members of tars that records are made of, by the records' numbers.

    Args:
      spec: what the user calls the data, without `webdataset:`.
      ending: of the members that make a record; "": pictures.

    Attributes:
      listing: a text that changes when a member comes, goes or changes its size.
      orphans: the members that belong to no record, by SHARD/MEMBER.
      left_out: how many other members are not read, by what they are.

    Raises NoData if there is nothing, UserError for a tar that is damaged, that names two members
    alike, or that is not what an index says of it.
    """

    def __init__(self, spec: str, split: str, ending: str = ""):
        self.shards, told = _shards(spec, split)
        sizes = [archive.path.stat().length for archive in self.shards]
        self.indices: list[TarIndex] = []
        with Progress(sum(sizes), "byte", "index of tars", unit_scale=True) as progress:
            for archive, size in zip(self.shards, sizes, strict=True):
                before = progress.n
                self.indices.append(
                    tar_index.read_index(
                        archive.path,
                        ending,
                        lambda passed, before=before: progress.update(before + passed - progress.n),
                    )
                )
                _check(archive, size, self.indices[-1], told.get(archive.path))
        self._ends = np.cumsum([len(index) for index in self.indices])
        if not len(self):
            raise NoData(f"{spec}: no {ending or 'picture'} in {len(self.shards)} tars")
        self.left_out: collections.Counter[str] = collections.Counter()
        self.orphans = []
        for archive, index in zip(self.shards, self.indices, strict=True):
            self.left_out.update(index.left_out)
            self.orphans += [f"{archive.name}/{name}" for name in index.orphans]
        folders = {path.parent for _, path in self.shards}
        names = {each: [path.name for path in each.glob("*.json")] for each in folders}
        self._more = [
            ShardCaptions(beside_tar(path, names[path.parent]), index)
            for (_, path), index in zip(self.shards, self.indices, strict=True)
        ]
        digests = [
            [archive.name, index.digest, more.digest]
            for archive, index, more in zip(self.shards, self.indices, self._more, strict=True)
        ]
        self.listing = json.dumps(digests)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key_of(self, record: int) -> str:
        shard, number = self.find(record)
        return f"{self.shards[shard].name}/{self.indices[shard].name(number)}"

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """The tars that the records are in, and their numbers there."""
        return [
            (os.path.realpath(archive.path), 0, len(index))
            for archive, index in zip(self.shards, self.indices, strict=True)
        ]

    def find(self, record: int) -> tuple[int, int]:
        """Returns the shard of a record and its number there."""
        if not 0 <= record < len(self):
            raise IndexError(record)
        shard = int(np.searchsorted(self._ends, record, side="right"))
        return shard, record - (int(self._ends[shard - 1]) if shard else 0)

    def read(self, shard: int, number: int, ending: str | None = None) -> bytes | None:
        """Returns a record's member, or the one beside it with an `ending`, None without.

        Raises BadImage if the tar has become shorter, Retry if it is away.
        """
        place = self.indices[shard].place(number, ending)
        if place is None:
            return None
        path = self.shards[shard].path
        try:
            with path.open("rb") as file:
                file.seek(place[0])
                data = file.read(place[1])
        except OSError as error:
            raise Retry(f"{path}: {reason_of(error)}; try again") from None
        if len(data) < place[1]:
            raise BadImage("unreadable", f"{path} has become shorter")
        return data

    def captions(self, shard: int, number: int) -> dict[str, Any]:
        """Returns "captions", "scores" and "truth" of a record. Raises BadImage, and Retry."""

        def read(ending: str) -> tuple[str, str] | None:
            data = self.read(shard, number, ending)
            return data if data is None else (ending, sidecars.decode_text(data, ending))

        fields, without = sidecars.beside(read, sidecars.COLUMNS)
        fields = self._more[shard].added(number, fields)
        if without and not fields["captions"]:
            raise without
        return fields


class WebDataset:
    """The records of tars with pictures."""

    def __init__(self, spec: str, split: str = "train"):
        self._tars = tars = Tars(spec, split)
        self.listing, self.places, self.orphans = tars.listing, tars.places, tars.orphans
        unread = dict(sorted(tars.left_out.items())[:20])
        if tars.orphans:
            unread[f"members without a picture, such as {tars.orphans[0]}"] = len(tars.orphans)
        if unread:
            counted = ", ".join(f"{what} ({count})" for what, count in unread.items())
            logging.warning("%s: %d pictures; not read: %s", spec, len(self), counted)

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, record: int) -> Record:
        shard, number = self._tars.find(record)
        key = self.key_of(record)
        try:
            image = self._tars.read(shard, number)
            return {"key": key, "image": image, **self._tars.captions(shard, number)}
        except BadImage as error:
            error.key = key
            raise

    def key_of(self, record: int) -> str:
        return self._tars.key_of(record)


def _shards(spec: str, split: str) -> tuple[list[archives.Archive], dict[epath.Path, dict]]:
    """Returns the tars of a split, and what an index says of each, where there is one."""
    tars: dict[epath.Path, None] = {}
    told: dict[epath.Path, dict] = {}
    for part in (name for each in spec.split("::") for name in archives.expand(each)):
        try:
            indices = archives.find(part, INDEX)
        except NoData:
            indices = []
        listed: dict[epath.Path, dict] = {}
        for path in indices:
            listed |= _listed(path) if path.name.endswith(".json") else {}
        told |= listed
        tars |= dict.fromkeys(listed or archives.find(part, ".tar"))
        if listed and epath.Path(named(part)).is_dir():
            more = set(archives.find(part, ".tar")) - listed.keys()
            if more:
                logging.warning("%s: %d tars that no index lists are not read", part, len(more))
    return archives.of_split(list(tars), spec, split), told


def _listed(path: epath.Path) -> dict[epath.Path, dict]:
    """Returns the tars that an index of wids lists, and its entries. Raises UserError."""
    try:
        values = json.loads(path.read_bytes())
        base, listed = values.get("base", ""), values["shardlist"]
        entries = {os.path.join(base, entry["url"]): entry for entry in listed}
        if not entries:
            raise ValueError("it lists no tar")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        why = error if isinstance(error, ValueError) else "it has no shardlist of urls"
        raise UserError(f"{path} is no index of wids: {' '.join(str(why).split())}") from None
    found = {}
    for name, entry in entries.items():
        places = [path.parent / name, path.parent / os.path.basename(name)]  # it may have moved
        there = [place for place in places if place.exists()]
        if not there:
            raise NoData(f"{path} lists {name}, which is not there; make the index anew")
        found[there[0]] = entry
    return found


def _check(archive: archives.Archive, size: int, index: TarIndex, told: dict | None) -> None:
    """Raises UserError if a tar is not what its entry in an index of wids says."""
    told = told or {}
    if told.get("filesize", size) != size:
        raise UserError(
            f"{archive.path} has {size} bytes, {told['filesize']} in the index; make the index anew"
        )
    if told.get("nsamples", index.samples) not in [index.samples, len(index)]:
        raise UserError(
            f"{archive.path} has {index.samples} samples, {told['nsamples']} in the index; make the"
            " index anew"
        )
