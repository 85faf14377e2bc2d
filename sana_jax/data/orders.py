"""Orders: which record is at which position of the endless sequence that batches are cut from.

An order is a pure function of (seed, position), in constant time and memory, so all hosts and
restarts agree.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from sana_jax.data.images import MAX_PIXELS
from sana_jax.data.records import Source
from sana_jax.data.sizes import image_sizes
from sana_jax.models.buckets import assign
from sana_jax.runtime.errors import UserError


class Order(Protocol):
    """The order of records, as TrainingLoader reads it."""

    length: int  # of an epoch, in positions
    settings: Any  # JSON, for a checkpoint to compare

    def __getitem__(self, position: int) -> int:
        """Returns the record at a position."""

    def replacement(self, position: int, rng: np.random.Generator) -> int:
        """Returns another record for a position."""


class GlobalOrder:
    """All records, in a new shuffle every epoch."""

    settings = 1  # version of the rule

    def __init__(self, records: int, seed: int):
        self.length = records
        # Seeds of grain's epochs are consecutive: spread ours, or seed 1 is seed 0 an epoch later.
        (spread,) = np.random.SeedSequence(seed).generate_state(1)
        self._shuffle = endless_shuffle(records, spread)

    def __getitem__(self, position: int) -> int:
        return self._shuffle[position]

    def replacement(self, position: int, rng: np.random.Generator) -> int:
        return int(rng.integers(self.length))


class BucketOrder:
    """Batches of one bucket each.

    In an epoch each bucket's records are shuffled and cut into full batches, and the batches of all
    buckets are shuffled. Records that do not fill a batch are left out, others in every epoch.

    With `repeat` none is left out: in as many epochs as a batch has rows, the records of a bucket
    fill as many batches as they are. A bucket of fewer records repeats them within a batch.

    Args:
      bucket_of_record: a number from 0 for each record; -1: never drawn.
      batch_size: of the global batch.
      repeat: use buckets of less than a batch as well.

    `left_out` counts the records that are never drawn, by bucket: those of -1, and of buckets with
    less than a batch. Raises UserError if no bucket holds a batch.
    """

    def __init__(
        self,
        bucket_of_record: Int[np.ndarray, " N"],
        batch_size: int,
        seed: int = 0,
        repeat: bool = False,
    ):
        buckets, least = np.asarray(bucket_of_record), 1 if repeat else batch_size
        self.records, self.batch_size, self.bucket_of_record = len(buckets), batch_size, buckets
        numbers, counts = np.unique(buckets, return_counts=True)
        sizes = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        used = [b for b, count in sizes.items() if b >= 0 and count >= least]
        self.left_out = {b: count for b, count in sizes.items() if b not in used}
        if not used:
            most = max((count for b, count in sizes.items() if b >= 0), default=0)
            raise UserError(
                f"batch_size={batch_size}: no bucket of images holds a batch; the largest has"
                f" {most} of {len(buckets)} records. Lower it, or give more data"
            )
        if self.left_out:
            each = ", ".join(f"{count} of bucket {b}" for b, count in self.left_out.items())
            logging.warning(
                "%d of %d records are never drawn, for their buckets hold less than a batch of %d"
                " (-1: not usable): %s",
                sum(self.left_out.values()),
                len(buckets),
                least,
                each,
            )
        self.buckets = used
        self._members = [np.flatnonzero(buckets == b) for b in used]
        seeds = np.random.SeedSequence(seed).generate_state(1 + max(used) + 1)
        self._shuffles = [
            endless_shuffle(len(members), seeds[1 + b])
            for b, members in zip(used, self._members, strict=True)
        ]
        # A round is an epoch; with `repeat`, as many epochs as a batch has rows.
        counts = np.array([len(members) for members in self._members])
        self._rows_of_round = counts * batch_size if repeat else counts
        self._ends = np.cumsum(self._rows_of_round // batch_size)
        self._batches_of_round = int(self._ends[-1])
        self._batches = endless_shuffle(self._batches_of_round, seeds[0])
        self.length = int(counts.sum()) if repeat else self._batches_of_round * batch_size
        about = {"kind": "buckets", "version": 1, "seed": seed}
        self.settings = about | {"buckets": digest_of(buckets)}
        self.settings |= {"repeat": True} if repeat else {}

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, self.batch_size)
        bucket, batch = self._batch(step)
        number = step // self._batches_of_round
        place = number * self._rows_of_round[bucket] + batch * self.batch_size + row
        return int(self._members[bucket][self._shuffles[bucket][int(place)]])

    def replacement(self, position: int, rng: np.random.Generator) -> int:
        """Returns another record of the same bucket."""
        members = self._members[self._batch(position // self.batch_size)[0]]
        return int(members[rng.integers(len(members))])

    def turn(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step, and a number that no other batch of the bucket has."""
        bucket, batch = self._batch(step)
        each = self._rows_of_round[bucket] // self.batch_size
        return self.buckets[bucket], int(step // self._batches_of_round * each + batch)

    def _batch(self, step: int) -> tuple[int, int]:
        """Returns the place of a step's bucket in `buckets`, and the batch's number in a round."""
        number = self._batches[step]
        bucket = int(np.searchsorted(self._ends, number, side="right"))
        return bucket, number - int(self._ends[bucket - 1] if bucket else 0)


def bucket_order(
    source: Source,
    table: tuple[tuple[int, int], ...],
    batch_size: int,
    seed: int = 0,
    *,
    upscale: bool = False,
    cache: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    repeat: bool = False,
) -> BucketOrder:
    """Makes the order for the images that a BucketTransform of these settings puts into buckets.

    Reads the header of every image, only once if a folder `cache` is given. Stored latents know
    their shapes and need no table.
    """
    shapes = getattr(source, "shapes", None)
    if shapes is not None:
        _, buckets = np.unique(shapes, axis=0, return_inverse=True)
        return BucketOrder(buckets.reshape(-1), batch_size, seed, repeat)
    sizes, _ = image_sizes(source, cache, max_pixels=max_pixels)
    return BucketOrder(assign(sizes, table, upscale), batch_size, seed, repeat)


def digest_of(buckets: Int[np.ndarray, " N"]) -> str:
    """Returns a hash of every record's bucket, for the settings of an order."""
    return hashlib.sha256(np.ascontiguousarray(buckets, "<i4")).hexdigest()[:16]


def endless_shuffle(count: int, seed) -> grain.MapDataset:
    """Returns shuffles of 0 .. count - 1 without end."""
    shuffled = grain.MapDataset.range(count).shuffle(int(seed)).repeat()
    shuffled[0]  # grain sets itself up at the first access, which threads must not share
    return shuffled
