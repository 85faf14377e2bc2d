"""Keeps the device busy: during a batch the next one is prepared and the last one saved.

JAX dispatches without waiting, so the main thread prepares and dispatches batch k + 1 while the
device computes batch k and threads save the images of batch k - 1.
"""

import collections
import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sana_jax.batch.tasks import Batch

IN_FLIGHT = 2  # batches that are dispatched and not yet fetched
THREADS = 8  # compressing a PNG takes a core a tenth of a second a megapixel
POLL_SECONDS = 0.001


@dataclasses.dataclass
class Span:
    """When a batch was dispatched, computed and saved, by time.monotonic."""

    images: int
    first: bool  # of its shape, so that it was compiled
    dispatched: float
    ready: float | None = None


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Images and seconds without the first batch of each shape, which compiles."""

    images: int
    seconds: float
    device_seconds: float  # of these, the time in which the device had work

    @classmethod
    def of(cls, spans: Sequence[Span], start: float, end: float) -> "Throughput":
        """`start` is the time before the first dispatch, `end` when the last image was saved."""
        images, seconds, device_seconds, before = 0, 0.0, 0.0, start
        for span in spans:
            if not span.first:
                images += span.images
                seconds += span.ready - before
                device_seconds += span.ready - max(span.dispatched, before)
            before = span.ready
        return cls(images, seconds + (end - before if images else 0), device_seconds)

    def __str__(self) -> str:
        if not self.images:
            return "compilation included"
        rate, share = self.images / self.seconds, self.device_seconds / self.seconds
        return f"{rate:.3g} images/s without compilation, device busy {share:.1%} of that time"


def wait(arrays: Any) -> None:
    """Waits for arrays, or until Ctrl-C, which JAX's own wait would not notice."""
    while not _are_ready(arrays):
        time.sleep(POLL_SECONDS)


def _are_ready(arrays: Any) -> bool:
    return all(array.is_ready() for array in jax.tree.leaves(arrays))


def overlap(
    batches: Sequence[Batch], dispatch: Callable[..., Any], save: Callable[..., None]
) -> Throughput:
    """Draws and saves all batches.

    Args:
      dispatch: batch -> its images, or a tree of arrays with a row an image, not waited for, the
        padding last.
      save: called on threads as save(task, pixels), or with a tree of rows instead of pixels.

    If anything is raised, images that are not yet being saved are dropped.
    """
    spans, shapes, start = [], set(), time.monotonic()
    in_flight, saving = collections.deque(), collections.deque()
    pool = ThreadPoolExecutor(THREADS)

    def fetch():
        batch, images, span = in_flight.popleft()
        wait(images)
        span.ready = span.ready or time.monotonic()
        spans.append(span)
        images = jax.tree.map(np.asarray, images)
        for k, task in enumerate(batch.tasks):
            saving.append(pool.submit(save, task, jax.tree.map(operator.itemgetter(k), images)))
        while saving and (saving[0].done() or len(saving) > 2 * len(batch.tasks)):
            saving.popleft().result()

    try:
        for batch in batches:
            if len(in_flight) == IN_FLIGHT:
                fetch()
            before = time.monotonic()
            images = dispatch(batch)
            for array in jax.tree.leaves(images):
                array.copy_to_host_async()
            for _, earlier, span in in_flight:
                if _are_ready(earlier):  # since when is unknown: the device gets no credit
                    span.ready = span.ready or before
            shape = batch.tasks[0].shape, batch.size
            span = Span(len(batch.tasks), shape not in shapes, time.monotonic())
            in_flight.append((batch, images, span))
            shapes.add(shape)
        while in_flight:
            fetch()
        for future in saving:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return Throughput.of(spans, start, time.monotonic())
