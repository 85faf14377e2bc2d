"""Where records come from: `shapes`, a folder of images, a TFDS data set, or stored latents.

A source is a random-access sequence of records (`Record`): `len(source)`, `source[i]`, and
`source.fingerprint`, a short text that changes when the files do. `source[i]` raises BadImage
where one record cannot be read, Retry where the storage is away; it may be called from threads.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NotRequired, Protocol, TypedDict

import numpy as np
from etils import epath

from sana_jax.data.folder import Folder
from sana_jax.data.images import BadImage
from sana_jax.data.tfds_source import TFDSSource
from sana_jax.errors import UserError

FINGERPRINTED = 256  # records, evenly spread, whose bytes are part of a fingerprint


class Record(TypedDict):
    """One image and what is known of it."""

    key: str  # unique in its source
    image: NotRequired[bytes]  # encoded; memory.InMemory puts pixels there, uint8 (H, W, 3)
    latents: NotRequired[np.ndarray]  # in place of the image: float32 (h, w, c), scaled
    captions: list[str]
    scores: list[float]  # one a caption, or none at all
    embeddings: NotRequired[list[np.ndarray]]  # of each caption, (rows that count, T)
    truth: str  # JSON, or ""


class Source(Protocol):
    """What the loaders read."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(
    spec: str,
    split: str = "train",
    data_dir: str | None = None,
    size: int = 128,
) -> Source:
    """Opens `spec`, one of

    - `shapes`: the built-in data set at `size` pixels, prepared under `data_dir` before;
    - `tfds:NAME[/CONFIG][:VERSION]`: a prepared TFDS data set under `data_dir`;
    - `precomputed:DIR`: latents that `python -m sana_jax.precompute` has written of that split to
      DIR, or to DIR/split;
    - anything else: a folder of images. Its subfolder `split` is read where there is one; where
      there is none the whole folder is the split `train`.

    Raises UserError: no such folder, data set or split, or nothing in it.
    """
    if spec == "shapes":
        from sana_jax.data import shapes  # what draws is not needed to read other sources

        return Fingerprinted(shapes.open(data_dir, split, size), f"shapes {split} {size}")
    if spec.startswith("tfds:"):
        source = TFDSSource(spec.removeprefix("tfds:"), split, data_dir)
        return Fingerprinted(source, source.name)
    if spec.startswith("precomputed:"):
        from sana_jax.data.precomputed import Precomputed

        return Precomputed(spec.removeprefix("precomputed:"), split)
    folder = Folder(_folder_of(spec, split))
    return Fingerprinted(folder, folder.listing)


class Fingerprinted:
    """Records with a fingerprint; one that its file's checksums reject raises BadImage."""

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
    """A hash of the description, the number of records and a sample of them."""
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
    """For reading and decoding; None: as many threads as there are cores, up to 16."""
    return ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1), "decode")


def _folder_of(spec: str, split: str) -> epath.Path:
    root = epath.Path(spec).expanduser()
    if not root.is_dir():
        known = "shapes, tfds:NAME, precomputed:DIR or a folder of images"
        raise UserError(f"{spec}: there is no such folder; the data is {known}")
    if (root / split).is_dir():
        return root / split
    inside = sorted(path.name for path in root.iterdir() if path.is_dir())
    if split == "train" and not {"test", "validation", "val"} & set(inside):
        return root
    there = f"there are {', '.join(inside[:10])}" if inside else "it has no subfolders"
    raise UserError(
        f"{spec}: no split {split!r}, which would be a subfolder; {there}."
        " Make one, or name another split (a folder without subfolders is the split train)"
    )
