"""Prefetching: batches are put on the devices one ahead of the step that runs."""

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sana_jax import sharding
from sana_jax.runtime.errors import UserError

POLL_SECONDS = 0.002  # between two looks at the device while it works


class Taken(NamedTuple):
    """A batch on the devices, its position, its rows and the time it was waited for."""

    batch: Any
    position: Any  # the iterator's state after it
    rows: int  # on all hosts together
    waited: float  # seconds that the device waited for it


class Prefetch:
    """Reads the next batch, and puts it on the devices, in a thread; a context.

    Attributes:
      position: the iterator's state before its first batch.
    """

    def __init__(self, batches: Iterator[Any], mesh: Mesh):
        self._batches, self._mesh = iter(batches), mesh
        self.position = self._state()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._next: concurrent.futures.Future | None = None

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *error) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, busy: Callable[[], bool], stop: Callable[[], bool]) -> Taken | None:
        """Returns the next batch, or None where `stop` becomes true while there is none.

        `busy` says whether the device has work; the wait counts from when it has none. Raises the
        errors of the iterator, and UserError where it ends or a batch does not split over the mesh.
        """
        self._next = self._next or self._pool.submit(self._read)
        idle = None
        while not self._next.done():
            if idle is None and not busy():
                idle = time.monotonic()
            if stop():
                return None
            concurrent.futures.wait([self._next], POLL_SECONDS if idle is None else 0.1)
        batch, position, rows = self._next.result()
        self._next = self._pool.submit(self._read)
        return Taken(batch, position, rows, 0.0 if idle is None else time.monotonic() - idle)

    def _read(self) -> tuple[Any, Any, int]:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise UserError(
                "the data ended; training needs batches for ever, at least one"
            ) from None
        position = self._state()
        rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
        divisor = sharding.batch_divisor(self._mesh)
        held = len(sharding.batch_rows(self._mesh, divisor))  # of `divisor` parts, on this host
        if len(rows) > 1 or max(rows) % held:
            raise UserError(f"a batch of {max(rows)} rows does not split over {held} devices")
        return sharding.put_batch(batch, self._mesh), position, max(rows) // held * divisor

    def _state(self) -> Any:
        return self._batches.get_state() if hasattr(self._batches, "get_state") else None
