"""Several processes make the batches of one, and end with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from sana_jax.data.images import BadImage
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.memory import InMemory
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import ImageTransform
from sana_jax.runtime.errors import DoNotRetry, Retry
from tests import PATIENCE
from tests.data import formats

ROOT = Path(__file__).parents[2]
CROP = ImageTransform(24, 24, crop="random", flip=True, upscale=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("workers")
    return open_source(f"webdataset:{formats.tars(root / 'tars', formats.pictures(20))}")


def batches(source, workers, transform=CROP):
    return iter(TrainingLoader(source, transform, batch_size=3, workers=workers, threads=1))


def test_the_same_batches_and_counts_at_any_number_of_processes(source):
    one, two = batches(source, 0), batches(InMemory(source), 2)
    expected = [next(one)["image"] for _ in range(6)]
    for step in range(3):
        np.testing.assert_array_equal(next(two)["image"], expected[step])
    state = two.get_state()
    two.close()
    for workers in 0, 3:
        again = batches(source, workers)
        again.set_state(state)
        for step in range(3, 6):
            np.testing.assert_array_equal(next(again)["image"], expected[step])
        assert again.get_state() == one.get_state()
        assert again.counts.rejected == one.counts.rejected and one.counts.read > one.counts.used
        again.close()


class Failing:
    """A source of which a record ends the process that reads it, or raises."""

    fingerprint = "failing"

    def __init__(self, how):
        self._how, self._parent = how, os.getpid()

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self._how == "killed" and os.getpid() != self._parent:
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"away": Retry("the disk is away"), "bad": BadImage("damaged")}[self._how]


@pytest.mark.parametrize(
    "how, kind, message",
    [
        ("away", Retry, "^the disk is away$"),
        ("bad", DoNotRetry, "no usable record in 100 tries"),
        ("killed", Retry, "a process of config.loader.workers ended .*exit code -9"),
    ],
)
def test_what_a_process_raises_is_raised_here(how, kind, message):
    found = batches(Failing(how), 1)
    with pytest.raises(kind, match=message):
        next(found)
    found.close()


SCRIPT = """
import sys, time
from sana_jax.data.sources import open_source
from tests.data.test_workers import batches
if __name__ == "__main__":
    found = batches(open_source(sys.argv[1]), 2)
    next(found)
    print("ready", flush=True)
    time.sleep(1000)
"""


def test_processes_end_with_one_that_is_killed(source, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    tars = Path(source.places[0][0]).parent
    command = [sys.executable, str(tmp_path / "script.py"), f"webdataset:{tars}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
    finally:
        process.kill()
        process.communicate()
    gone, alive = psutil.wait_procs(children, PATIENCE)
    assert not alive
