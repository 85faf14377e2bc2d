"""A signal ends a run after the step that runs, whatever the run is doing."""

import os
import signal
import threading

import pytest

from sana_jax.runtime.errors import Retry
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.loop import LoopConfig
from tests import PATIENCE
from tests.training.toy_loop import Batches, run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_after_the_step(tmp_path, number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def send(batch):
        if batch == 5:
            os.kill(os.getpid(), number)

    # The signal comes while batch 5 is read, and step 4 or 5 runs.
    message = f"stopped by {number.name} after step [56] of 20: saved"
    with pytest.raises(Retry, match=message) as error:
        run(tmp_path, Batches(before=send), LoopConfig(20))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    with Checkpoints(tmp_path, {}, {}) as checkpoints:
        assert f"after step {checkpoints.steps()[-1]} of" in str(error.value)


def test_signal_in_a_hook(tmp_path):
    def hook(s, k):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Retry, match="after step 3 of 20"):
        run(tmp_path, Batches(), LoopConfig(20, evaluate_every=3), on_evaluate=hook)


def test_signal_while_there_is_no_data(tmp_path):
    released = threading.Event()

    def stall(batch):
        if batch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            released.wait(PATIENCE)

    try:
        with pytest.raises(Retry, match="after step 4 of 20"):
            run(tmp_path, Batches(before=stall), LoopConfig(20))
    finally:
        released.set()
