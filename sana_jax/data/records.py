"""Records of data sets, what a source of them can do, and the hash that stands for a source."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from sana_jax.data.images import BadImage
from sana_jax.runtime.errors import UserError

FINGERPRINTED = 256  # records, evenly spread, whose bytes are part of a fingerprint


class Record(TypedDict):
    """One image with its captions and metadata."""

    key: str  # unique in its source
    image: NotRequired[bytes]  # encoded; memory.InMemory puts pixels there, uint8 (H, W, 3)
    latents: NotRequired[np.ndarray]  # in place of the image: float32 (h, w, c), scaled
    captions: list[str]
    scores: list[float]  # one a caption, or none at all
    embeddings: NotRequired[list[np.ndarray]]  # of each caption, (rows that count, T)
    truth: str  # JSON, or ""
    prior: NotRequired[bool]  # one of prior.py


class NoData(UserError):
    """The data is not there. Where it has been there before, its storage may only be away."""


class Source(Protocol):
    """A random-access sequence of records, as the loaders read it."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class Fingerprinted:
    """Records with a fingerprint; a record that its file's checksums reject raises BadImage."""

    def __init__(self, records, description: str):
        self._records = records
        self.fingerprint = fingerprint(self, description)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            return self._records[index]
        except BadImage as error:
            raise _named(error, self._records, index) from None
        except (RuntimeError, ValueError) as error:  # ArrayRecord's, and TFDS' parser's
            bad = BadImage("unreadable", f"{type(error).__name__}: {error}")
            raise _named(bad, self._records, index) from None

    @property
    def places(self) -> list[tuple[str, int, int]] | None:
        """Where the records are, as (file, first, end) by their numbers in it; None: not known."""
        return getattr(self._records, "places", None)

    @property
    def orphans(self) -> list[str]:
        """The files that belong to no record, such as captions without their picture."""
        return getattr(self._records, "orphans", [])


def _named(error: BadImage, records, index: int) -> BadImage:
    """Gives an error the key of its record, as far as the source knows it before it is read."""
    if not error.key and hasattr(records, "key_of"):
        error.key = records.key_of(index)
    return error


def captioned(captions: list[str], scores: list[float], truth: str) -> dict:
    """Returns the fields of a record without empty captions, whose scores and styles go as well.

    A `truth` of {"captions": [{"style": ...}, ...]} describes every caption. Raises BadImage if
    captions are empty and it is not known which scores are theirs.
    """
    kept = [i for i, caption in enumerate(captions) if caption.strip()]
    if len(kept) < len(captions):
        if scores and len(scores) != len(captions):
            raise BadImage("bad_caption", f"{len(captions)} captions but {len(scores)} scores")
        scores = [scores[i] for i in kept] if scores else []
        truth = _truth_of(truth, kept, len(captions))
    return {"captions": [captions[i].strip() for i in kept], "scores": scores, "truth": truth}


def _truth_of(truth: str, kept: list[int], count: int) -> str:
    """Returns a truth with the descriptions of the captions that are kept, if it has one each."""
    try:
        values = json.loads(truth)
        described = values["captions"]
        if not isinstance(described, list) or len(described) != count:
            return truth
        return json.dumps(values | {"captions": [described[i] for i in kept]}, sort_keys=True)
    except (ValueError, TypeError, KeyError, RecursionError):
        return truth


def fingerprint(records, description: str = "") -> str:
    """Returns a hash of the description, the number of records and a sample of them."""
    digest = hashlib.sha256(f"{len(records)}\n{description}\n".encode())
    step = max(1, -(-len(records) // FINGERPRINTED))
    for index in range(0, len(records), step):
        try:
            record = records[index]
            digest.update(record["image"])
            rest = {key: value for key, value in record.items() if key != "image"}
        except BadImage as error:
            rest = {"bad": error.reason}
        digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def thread_pool(threads: int | None = None) -> ThreadPoolExecutor:
    """Makes threads for reading and decoding; None: as many as there are cores, up to 16."""
    return ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1), "decode")
