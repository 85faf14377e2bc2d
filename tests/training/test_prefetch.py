"""Batches come one ahead of the step that runs, and errors of the data where they are taken."""

import threading

import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.runtime.errors import UserError
from sana_jax.training.loop import LoopConfig
from sana_jax.training.prefetch import Prefetch
from tests import PATIENCE
from tests.training.toy_loop import Batches, run


def test_error_of_the_data_comes_through(tmp_path):
    def fail(batch):
        if batch == 3:
            raise OSError("a bad disk")

    with pytest.raises(OSError, match="a bad disk"):
        run(tmp_path, Batches(before=fail), LoopConfig(5))


@pytest.mark.parametrize(
    "batches, message",
    [
        (Batches(count=0), "the data ended"),
        (Batches(rows=6), "a batch of 6 rows does not split over 8 devices"),
    ],
)
def test_data_that_does_not_do(tmp_path, batches, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, batches, LoopConfig(5))


def test_a_batch_is_read_ahead_and_the_position_is_that_of_the_batch_taken():
    read = [threading.Event() for _ in range(4)]
    batches = Batches(before=lambda number: read[number].set())
    with Prefetch(batches, sharding.make_mesh()) as source:
        assert source.position == 0
        for number in range(3):
            taken = source.take(busy=lambda: True, stop=lambda: False)
            assert (taken.position, taken.rows, taken.waited) == (number + 1, 8, 0.0)
            assert read[number + 1].wait(PATIENCE)  # while this one would train
            np.testing.assert_array_equal(taken.batch["x"], number)


def test_only_an_idle_device_waits_for_data():
    released, looks = threading.Event(), []

    def busy():  # at two looks, then idle
        looks.append(len(looks) < 2)
        return looks[-1] or released.set()

    batches = Batches(before=lambda number: released.wait(PATIENCE))
    with Prefetch(batches, sharding.make_mesh()) as source:
        taken = source.take(busy, stop=lambda: False)
    assert looks == [True, True, False] and 0 < taken.waited < 10
