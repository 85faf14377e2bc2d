"""Tars of encoded pictures as SANA's own code stores them, which training reads in place of images.

    latents:TARS   tars as webdataset.py finds them; a record is PATH.npy with
        PATH.npy   latents, (channels, height, width), multiplied by the scaling factor already
        PATH.json  the captions, as beside pictures
        PATH.npz   optionally the text features of the first caption: "caption_feature",
                   (rows, width), and "attention_mask", (rows,)

Axes of length 1 may stand before these. `load_vae_feat` and `load_text_feat` read them in SANA's
code. Nothing in them says which networks made them.
"""

import hashlib
import io

import numpy as np

from sana_jax.data.images import BadImage
from sana_jax.data.records import FINGERPRINTED, Record
from sana_jax.data.tar_index import LATENTS
from sana_jax.data.webdataset import Tars
from sana_jax.runtime.errors import UserError

FEATURES = ".npz"


class LatentTars:
    """The records of such tars; latents are float32 (h, w, c), as in precomputed.Precomputed.

    Attributes:
      channels: of all latents.
      shapes: (h, w) of every record's latents, int (N, 2).
      rows: text rows of the features; None without features.

    Raises what webdataset.Tars does, and UserError if a member is no array of three axes, if
    channels differ, or if some records have features and others not.
    """

    def __init__(self, spec: str, split: str = "train"):
        self.folder, self._tars = f"latents:{spec}", Tars(spec, split, LATENTS)
        shapes = np.concatenate([index.shapes for index in self._tars.indices]).astype(np.int64)
        for wrong, why in (
            (shapes.min(1) == 0, "is no array of (channels, height, width)"),
            (shapes[:, 0] != shapes[0, 0], f"has other channels than the first, {shapes[0, 0]}"),
        ):
            if wrong.any():
                raise UserError(f"{self.folder}: {self.key_of(int(wrong.argmax()))} {why}")
        self.channels, self.shapes = int(shapes[0, 0]), shapes[:, 1:]
        self.places, self.orphans = self._tars.places, self._tars.orphans
        self.rows = self._rows()
        digest = hashlib.sha256(self._tars.listing.encode())
        for record in range(0, len(self), -(-len(self) // FINGERPRINTED)):
            digest.update(self._tars.read(*self._tars.find(record)))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._tars)

    def __getitem__(self, record: int) -> Record:
        shard, number = self._tars.find(record)
        try:
            latents = _latents(self._tars.read(shard, number))
            if latents.shape[:2] != tuple(self.shapes[record]) or not np.isfinite(latents).all():
                raise BadImage("bad_latents", f"latents of shape {latents.shape}")
            found = {"key": self.key_of(record), "latents": latents}
            found |= self._tars.captions(shard, number)
            if self.rows is None:
                return found
            rows = _shown(self._tars.read(shard, number, FEATURES), self.rows)
            first = {name: found[name][:1] for name in ("captions", "scores")}
            return found | first | {"embeddings": [rows]}
        except BadImage as error:
            error.key = self.key_of(record)
            raise

    def key_of(self, record: int) -> str:
        return self._tars.key_of(record)

    def _rows(self) -> int | None:
        there = np.concatenate([index.has(FEATURES) for index in self._tars.indices])
        if not there.any():
            return None
        if not there.all():
            raise UserError(
                f"{self.folder}: {self.key_of(int((~there).argmax()))} has no text features beside"
                " it, others have; leave all away, or none"
            )
        try:
            return len(_features(self._tars.read(*self._tars.find(0), FEATURES))[0])
        except BadImage as error:
            raise UserError(f"{self.folder}: {self.key_of(0)}: {error}") from None


def first_rms(source: LatentTars, count: int = 16) -> float | None:
    """Returns the root mean square of the first latents; None if none of them can be read."""
    squares = []
    for record in range(min(count, len(source))):
        try:
            squares.append(np.square(source[record]["latents"]).mean())
        except BadImage:
            continue
    return float(np.sqrt(np.mean(squares))) if squares else None


def _latents(data: bytes) -> np.ndarray:
    """Returns latents, float32 (h, w, c). Raises BadImage."""
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
        return found.reshape(found.shape[-3:]).transpose(1, 2, 0).astype(np.float32)
    except Exception as error:  # a damaged file makes NumPy raise nearly anything
        raise BadImage("bad_latents", f"{error}") from None


def _features(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns text features, float32 (rows, width), and which rows count. Raises BadImage."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            features = found["caption_feature"]
            rows, width = features.shape[-2:]
            mask = found["attention_mask"] if "attention_mask" in found else np.ones(rows)
            features = features.reshape(rows, width).astype(np.float32)
            return features, mask.reshape(rows).astype(bool)
    except Exception as error:  # as above
        raise BadImage("bad_latents", f"text features: {error}") from None


def _shown(data: bytes, rows: int) -> np.ndarray:
    """Returns the rows of text features that their mask shows."""
    features, mask = _features(data)
    if len(features) == rows and np.isfinite(features).all() and mask.any():
        return features[mask]
    raise BadImage("bad_latents", f"text features are no ({rows}, width) with a mask of {rows}")
