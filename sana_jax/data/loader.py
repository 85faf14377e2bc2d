"""Loads batches for training and evaluation, by grain.

A training batch is a pure function of (source, transform, seed, batch size, step). The order
(orders.py) decides which record is at global position step * batch_size + row: a new shuffle of all
records every epoch, or one aspect ratio a batch. All other randomness comes from (seed, position).
A record that cannot be used is replaced by one drawn from (seed, position, attempt), and counted
when its batch is delivered. So the number of threads, processes and hosts, restarts and prefetching
change nothing, counts included.

    source = open_source("photos")
    transform = ImageTransform(height=128, width=128, crop="random", flip=True)
    batches = iter(TrainingLoader(source, transform, batch_size=64, seed=0))
    images = next(batches)["image"]  # uint8 (64, 128, 128, 3)
    state = batches.get_state()  # plain JSON

The transform (transforms.py) turns a record into a row.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sana_jax.data.images import BadImage
from sana_jax.data.orders import GlobalOrder, Order
from sana_jax.data.records import Source, thread_pool
from sana_jax.data.rejections import Budget, Counts, Rejection
from sana_jax.data.transforms import Example, Transform
from sana_jax.data.workers import in_processes, worker_errors
from sana_jax.runtime.checks import at_least
from sana_jax.runtime.errors import DoNotRetry, UserError

MAX_ATTEMPTS = 100  # records tried for one place in a batch


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """The settings for reading data; they do not change the batches."""

    threads: int | None = 8  # that decode; None: as many as there are cores, up to 16
    prefetch: int = 4  # batches made ready ahead
    # Processes that make batches, with so many threads each; 0: this one, whose threads share one
    # interpreter. Worth it above some 8 cores.
    workers: int = 0
    # The share of bad records that a run tolerates, or ten per epoch and host if that is more.
    bad_fraction: float = 0.001

    def __post_init__(self):
        for name in "threads", "prefetch", "workers", "bad_fraction":
            at_least(name, getattr(self, name), 0)


class TrainingLoader:
    """Endless shuffled batches; `iter()` gives a TrainingIterator.

    Args:
      batch_size: rows of the global batch.
      seed: of the order and of the transform's randomness.
      order: decides which record is where; None: a global shuffle from `seed`.
      rows: of every batch that this host loads (sharding.batch_rows); None: all.
      threads: for decoding; None: as many as there are cores, up to 16.
      prefetch: batches that are prepared ahead.
      workers: processes that make batches in turn (workers.py); 0: this one.
      budget: of bad records. Every host counts for itself.
      repeat: a batch may be larger than the data, whose records then stand in it more than once.

    Raises UserError if the numbers do not fit.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int = 0,
        order: Order | None = None,
        rows: Sequence[int] | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        workers: int = 0,
        budget: Budget = Budget(),  # noqa: B008 (it is frozen)
        repeat: bool = False,
    ):
        if len(source) < (1 if repeat else batch_size):
            raise UserError(
                f"batch_size={batch_size}: the data has {len(source)} records, less than a batch;"
                " lower it, or give more data"
            )
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: it is at least 1")
        if seed < 0:
            raise UserError(f"seed={seed}: it is at least 0")
        self.source, self.transform, self.batch_size = source, transform, batch_size
        self.seed, self.budget = seed, budget
        self.rows = range(batch_size) if rows is None else rows
        self._prefetch, self._threads, self._workers = prefetch, threads, workers
        self._pool = thread_pool(threads)
        self.order = order if order is not None else GlobalOrder(len(source), seed)
        cut, known = getattr(order, "batch_size", batch_size), getattr(order, "records", None)
        if cut != batch_size or known not in (None, len(source)):
            raise ValueError(f"an order of {known} records in batches of {cut}, not {batch_size}")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides a batch, for a checkpoint to keep and compare."""
        return {
            "order": self.order.settings,
            "source": self.source.fingerprint,
            "records": len(self.source),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "transform": dict(self.transform.settings),
        }

    def batch(self, step: int) -> Example:
        """Returns this host's rows of batch `step`, as the iterator does."""
        return self.load(step)[0]

    def load(self, step: int) -> tuple[Example, list[Rejection]]:
        """Returns a batch and the rejections of the records that were replaced in it."""
        first = step * self.batch_size
        examples, rejections = zip(
            *self._pool.map(self._example, [first + row for row in self.rows]), strict=True
        )
        return _stack(examples), sum(rejections, [])

    def _example(self, position: int) -> tuple[Example, list[Rejection]]:
        rejections = []
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((self.seed, position, attempt))
            if attempt == 0:
                index = self.order[position]
            else:
                index = self.order.replacement(position, rng)
            example = attempt_record(self.source, index, self.transform, rng)
            if not isinstance(example, Rejection):
                return example, rejections
            rejections.append(example)
        counts = Counts()
        counts.add(0, rejections)
        raise DoNotRetry(
            f"no usable record in {MAX_ATTEMPTS} tries ({counts}); for example"
            f" {counts.some_examples()}"
        )

    def __iter__(self) -> "TrainingIterator":
        return TrainingIterator(self)

    def batches(self, first: int = 0) -> grain.IterDataset:
        """Yields `load(step)` for steps first, first + 1, ..., prepared ahead."""
        steps = grain.MapDataset.range(first, sys.maxsize // self.batch_size).map(self.load)
        return in_processes(steps, self._workers, self._prefetch)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another process needs; threads it makes itself."""
        return {name: value for name, value in vars(self).items() if name != "_pool"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pool = thread_pool(self._threads)


class TrainingIterator(grain.DatasetIterator):
    """A position in a loader's batches, and the counts of records up to it.

    Its state is plain JSON. `next` raises DoNotRetry if the budget of bad records is used up.
    """

    def __init__(self, loader: TrainingLoader):
        super().__init__(loader.batches().__iter__())
        self._loader = loader
        self.step = 0  # the number of the next batch
        self.counts = Counts()  # of this host

    def __next__(self) -> Example:
        with worker_errors():
            batch, rejections = next(self._parent)
        self.step += 1
        self.counts.add(len(self._loader.rows), rejections)
        position = self.step * self._loader.batch_size
        self.counts.check(self._loader.budget, -(-position // self._loader.order.length))
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step, **self.counts.state()}

    def share(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns this host's state from those of another number of hosts: the first counts on."""
        first = self._loader.rows[0] == 0
        counts = sum(map(Counts.from_state, states), Counts(hosts=0)) if first else Counts()
        return {"step": states[0]["step"], **counts.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.close()
        self._parents = (self._loader.batches(state["step"]).__iter__(),)
        self.step, self.counts = state["step"], Counts.from_state(state)

    def close(self) -> None:
        self._parent.close()
        super().close()


class EvaluationLoader:
    """Passes over the data in order, in batches of one size; it can be iterated many times.

    Every batch also has "valid", bool (rows,), and "index", int64 (rows,). After the end of the
    data, and for records that cannot be used, valid is False and the row is zeros. `counts` are
    those of the last pass.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        limit: int | None = None,
        threads: int | None = None,
        prefetch: int = 2,
    ):
        self.source, self.transform, self.batch_size = source, transform, batch_size
        self.records = min(len(source), limit or len(source))
        self.counts = Counts()
        self._prefetch = prefetch
        self._pool = thread_pool(threads)
        tries = (self._example(index) for index in range(min(self.records, MAX_ATTEMPTS)))
        reason = "there is none"
        for found in tries:
            if not isinstance(found, Rejection):
                break
            reason = f"the last is {found.key}, {found.detail}"
        else:
            raise UserError(f"none of the first records can be used; check the data: {reason}")
        self._zeros = {name: np.zeros_like(value) for name, value in found.items()}

    def __len__(self) -> int:
        return -(-self.records // self.batch_size)

    def __iter__(self) -> Iterator[Example]:
        self.counts = Counts()
        for batch, rejections in self.batches(range(len(self))):
            self.counts.add(int(batch["valid"].sum()), rejections)
            yield batch

    def batches(self, steps: Sequence[int]) -> Iterator[tuple[Example, list[Rejection]]]:
        """Yields `load(step)` of some steps, prepared ahead; it does not count."""
        loaded = grain.MapDataset.source(steps).map(self.load)
        yield from loaded.to_iter_dataset(grain.ReadOptions(self._prefetch, self._prefetch))

    def load(self, step: int) -> tuple[Example, list[Rejection]]:
        """Returns batch `step` and the rejections of the records that are masked out in it."""
        indices = [step * self.batch_size + row for row in range(self.batch_size)]
        found = list(self._pool.map(self._example, indices))
        good = [isinstance(example, dict) for example in found]
        rows = [example if ok else self._zeros for example, ok in zip(found, good, strict=True)]
        batch = _stack(rows) | {"valid": np.array(good), "index": np.array(indices)}
        return batch, [rejected for rejected in found if isinstance(rejected, Rejection)]

    def _example(self, index: int) -> Example | Rejection | None:
        if index >= self.records:
            return None
        return attempt_record(self.source, index, self.transform, np.random.default_rng((0, index)))


def attempt_record(
    source: Source, index: int, transform: Transform, rng: np.random.Generator
) -> Example | Rejection:
    """Returns the transformed record `index`, or its rejection."""
    key = f"record {index}"
    try:
        record = source[index]
        key = record["key"]
        return transform(record, rng)
    except BadImage as error:
        return Rejection(error.key or key, error.reason, str(error))


def _stack(examples) -> Example:
    return {name: np.stack([row[name] for row in examples]) for name in examples[0]}
