"""Batches stay in order, two at most are on the device, and what fails stops the run."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.batch.overlap import IN_FLIGHT, Span, Throughput, overlap
from sana_jax.batch.tasks import Batch, Task, make_batches


class SlowArray:
    """Stands in for a jax array that the device computes for a while, one after the other."""

    device = 0.0  # until when it is busy

    def __init__(self, pixels, seconds: float):
        SlowArray.device = self.ready = max(time.monotonic(), SlowArray.device) + seconds
        self.pixels, self.fetched = pixels, False

    def is_ready(self):
        return time.monotonic() >= self.ready

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        assert self.is_ready()
        self.fetched = True
        return self.pixels


def run(batches, seconds=0.0, save=None, prepare=0.0):
    """What was saved, the arrays, how many of them were ever in flight, and the throughput."""
    arrays, saved, most = [], {}, 0

    def dispatch(batch: Batch):
        nonlocal most
        time.sleep(prepare)
        numbers = np.array([task.number for task in batch.padded()])
        arrays.append(SlowArray(np.broadcast_to(numbers[:, None], (batch.size, 5)), seconds))
        most = max(most, sum(not array.fetched for array in arrays))
        return arrays[-1]

    def keep(task, pixels):
        if save:
            save(task)
        saved[task.number] = pixels

    throughput = overlap(batches, dispatch, keep)
    return saved, arrays, most, throughput


def tasks(count, **fields):
    return [Task(i, "a", i, **fields) for i in range(count)]


def test_every_image_is_saved_and_no_padding():
    batches = make_batches(tasks(21), 4, 1)
    saved, arrays, most, _ = run(batches)
    assert len(arrays) == 6 and most == IN_FLIGHT
    assert sorted(saved) == list(range(21))
    assert all((pixels == number).all() for number, pixels in saved.items())


def test_jax_arrays():
    saved = {}
    batches = make_batches(tasks(5), 2, 1)
    overlap(
        batches, lambda b: jnp.arange(b.size) + b.tasks[0].number, lambda t, x: saved.update({t: x})
    )
    assert {task.number: int(x) for task, x in saved.items()} == {i: i for i in range(5)}


def test_device_never_waits_for_the_host():
    """Host work of 30 ms on either side of 40 ms on the device costs nothing but its ends."""
    batches = make_batches(tasks(12), 1, 1)
    start = time.monotonic()
    throughput = run(batches, 0.04, lambda task: time.sleep(0.03), prepare=0.03)[-1]
    assert time.monotonic() - start < 12 * 0.04 + 0.3
    assert throughput.images == 11
    assert throughput.device_seconds / throughput.seconds > 0.8


def test_slow_host_shows_in_the_share():
    throughput = run(make_batches(tasks(8), 1, 1), seconds=0.01, prepare=0.04)[-1]
    assert throughput.device_seconds / throughput.seconds < 0.5


def test_throughput():
    spans = [
        Span(8, True, dispatched=5, ready=6),
        Span(8, False, dispatched=5.5, ready=7),  # 1 s of work
        Span(4, False, dispatched=7.5, ready=8),  # half a second, after a pause
        Span(8, True, dispatched=9, ready=20),
        Span(8, False, dispatched=9, ready=22),
    ]
    throughput = Throughput.of(spans, start=0, end=23)
    assert throughput == Throughput(images=20, seconds=1 + 1 + 2 + 1, device_seconds=1 + 0.5 + 2)
    assert str(throughput) == "4 images/s without compilation, device busy 70.0% of that time"
    assert "compilation included" in str(Throughput.of(spans[:1], 0, 6))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failing_dispatch(error):
    before = threading.active_count()

    def dispatch(batch):
        if batch.tasks[0].number == 4:
            raise error
        return SlowArray(np.zeros((1, 5)), 0.01)

    saved = []
    with pytest.raises(error):
        overlap(make_batches(tasks(9), 1, 1), dispatch, lambda task, _: saved.append(task.number))
    assert set(saved) <= {0, 1, 2} and threading.active_count() <= before


def test_failing_save_stops_soon():
    def save(task):
        if task.number == 3:
            raise OSError("full")

    arrays = []
    with pytest.raises(OSError, match="full"):
        run(make_batches(tasks(100), 1, 1), 0.01, save)
    assert len(arrays) < 20


def test_saving_is_not_outrun():
    """Images wait on the host in a bounded number."""
    done, waiting = [0], []

    def save(task):
        waiting.append(task.number - done[0])
        time.sleep(0.02)
        done[0] += 1

    run(make_batches(tasks(60), 2, 1), 0.0, save)
    assert max(waiting) < 20
