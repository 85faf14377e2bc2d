"""Prior preservation: a batch of pictures to learn, and of pictures of their class to remember.

DreamBooth (Ruiz et al., arXiv 2208.12242, section 3.3): the first half of each batch is of the data
set, the second of pictures that the model drew of the class before it was trained further. The loss
is the mean error of the first half, and `weight` times that of the second. The class is one prompt,
or the prompts of a file: all that the model should go on drawing as it does. Where batches are of
buckets, both halves of a batch are of one bucket, and so of one size.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from sana_jax.data.images import BadImage
from sana_jax.data.orders import BucketOrder, Order, digest_of, endless_shuffle
from sana_jax.data.records import Record, Source
from sana_jax.data.transforms import Example, Transform
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import reason_of


class ClassPictures:
    """The pictures of a class in a folder, and the prompt of each as its caption."""

    def __init__(self, folder: epath.Path, files: Sequence[str], captions: Sequence[str]):
        self._folder, self._files, self._captions = folder, files, captions

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path = self._folder / self._files[index]
        try:
            image = path.read_bytes()
        except FileNotFoundError:
            raise BadImage("unreadable", f"{path} is gone") from None
        except OSError as error:
            raise Retry(f"{path}: {reason_of(error)}; try again") from None
        key, captions = f"class picture {self._files[index]}", [self._captions[index]]
        return {"key": key, "image": image, "captions": captions, "scores": [], "truth": ""}


class WithPrior:
    """The records of the data, and after them those of the class, which have "prior"."""

    def __init__(self, data: Source, prior: Source):
        self.data, self._prior = data, prior
        text = f"{data.fingerprint}\n{prior.fingerprint}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.data) + len(self._prior)

    def __getitem__(self, index: int) -> Record:
        if index < len(self.data):
            return self.data[index]
        return self._prior[index - len(self.data)] | {"prior": True}


class PriorOrder:
    """Batches whose second half is of the class.

    Args:
      order: of the data's records, in batches of half the size.
      records: of the data; those of the class follow.
      buckets: of the class's records, as of `order` where it has buckets; else zeros.
      batch_size: of the global batch, an even number.

    Raises UserError if no record of the class has a bucket that the data has.
    """

    def __init__(
        self,
        order: Order,
        records: int,
        buckets: Int[np.ndarray, " N"],
        batch_size: int,
        seed: int = 0,
    ):
        self._order, self._half = order, batch_size // 2
        self.batch_size, self.records = batch_size, records + len(buckets)
        self.length = 2 * order.length
        needed = order.buckets if isinstance(order, BucketOrder) else [0]
        self._members = {b: records + np.flatnonzero(buckets == b) for b in needed}
        if empty := [b for b, members in self._members.items() if not len(members)]:
            raise UserError(f"config.prior: there is no picture of the size of bucket {empty[0]}")
        # Not the order's own seeds: the halves would be shuffled alike.
        seeds = np.random.SeedSequence((seed, 1)).generate_state(1 + max(needed))
        self._shuffles = {b: endless_shuffle(len(self._members[b]), seeds[b]) for b in needed}
        about = {"kind": "prior", "version": 1, "seed": seed, "buckets": digest_of(buckets)}
        self.settings = about | {"order": order.settings}

    def __getitem__(self, position: int) -> int:
        step, row = divmod(position, self.batch_size)
        if row < self._half:
            return self._order[step * self._half + row]
        bucket, turn = self._turn(step)
        place = self._shuffles[bucket][turn * self._half + row - self._half]
        return int(self._members[bucket][place])

    def replacement(self, position: int, rng: np.random.Generator) -> int:
        """Returns another record of the same half and bucket."""
        step, row = divmod(position, self.batch_size)
        if row < self._half:
            return self._order.replacement(step * self._half + row, rng)
        members = self._members[self._turn(step)[0]]
        return int(members[rng.integers(len(members))])

    def _turn(self, step: int) -> tuple[int, int]:
        """Returns the bucket of a step, and how many batches of it are others."""
        return self._order.turn(step) if isinstance(self._order, BucketOrder) else (0, step)


class WeightedRows:
    """Adds "weight", float32 (), by which a row's error counts: twice, as it has half a batch."""

    def __init__(self, transform: Transform, prior: float):
        self._transform, self._prior = transform, prior

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._transform.settings) | {"prior": self._prior}

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        weight = 2 * (self._prior if record.get("prior") else 1.0)
        return self._transform(record, rng) | {"weight": np.float32(weight)}


def share_out(count: int, buckets: Int[np.ndarray, " N"]) -> Int[np.ndarray, " M"]:
    """Returns the buckets of `count` class pictures, shared out as those of the data are.

    Every bucket has at least one, so there may be more than `count`.

    Args:
      buckets: of the data's records that are drawn.
    """
    numbers, counts = np.unique(buckets, return_counts=True)
    ends = np.round(np.cumsum(counts) * count / len(buckets)).astype(int)
    return np.repeat(numbers, np.maximum(np.diff(ends, prepend=0), 1))
