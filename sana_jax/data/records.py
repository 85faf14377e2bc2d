"""Records of data sets, what a source of them can do, and the hash that stands for a source."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from sana_jax.data.images import BadImage

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
        except BadImage:
            raise
        except (RuntimeError, ValueError) as error:  # ArrayRecord's, and TFDS' parser's
            raise BadImage("unreadable", f"{type(error).__name__}: {error}") from None


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
