"""The two ends of a measurement's process."""

import os
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sana_jax.measure import worker
from sana_jax.measure.inputs import Settings
from sana_jax.measure.worker import Worker
from sana_jax.runtime.errors import UserError

TINY = Settings("tiny", "trunk", 1, 32, "float32", 1)


def test_a_killed_process_is_named():
    with Worker("ours", TINY) as ours:
        os.kill(ours._process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="trunk, ours: .*too little memory"):
            ours.ask("describe")


def test_ctrl_c_is_the_parents_affair_from_the_first():
    """A terminal sends it to both; what is imported first would end with a traceback."""
    with Worker("ours", TINY) as ours:
        os.kill(ours._process.pid, signal.SIGINT)
        with open(f"/proc/{ours._process.pid}/status") as file:
            (blocked,) = (line.split()[1] for line in file if line.startswith("SigBlk"))
        assert int(blocked, 16) & 1 << signal.SIGINT - 1
        ours.ask("describe")
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_errors_cross_over():
    with Worker("ours", Settings("huge", "trunk", 1, 32, "float32", 1)) as ours:
        with pytest.raises(UserError, match="preset 'huge' is not one of"):
            ours.ask("describe")
    with Worker("ours", TINY) as ours, pytest.raises(RuntimeError, match="'nothing'"):
        ours.ask("nothing")


@pytest.mark.parametrize("kind", ["ours", "diffusers"])
def test_a_side_lends_itself_no_more_than_it_needs(kind, monkeypatch):
    """Its own process imports JAX with the main module, before anything can be said."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # and is put back after it
    found, told = [], []
    monkeypatch.setattr(worker.os, "dup2", lambda *args: None)
    monkeypatch.setattr(worker.sys, "exit", lambda status: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.append((name, value)))

    class Side:
        def __init__(self, *args):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes")

    monkeypatch.setattr(worker, "_Side", Side)
    worker._serve(kind, TINY, SimpleNamespace(send=told.append))
    assert ("jax_enable_compilation_cache", False) in found
    assert (("jax_platforms", "cpu") in found) == (kind == "diffusers")
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    ((answer, reason),) = told
    assert answer == "user" and "too little memory: RESOURCE_EXHAUSTED" in reason


def test_fast_calls_are_averaged(monkeypatch):
    class Subject:
        calls = []

        def run(self, call):
            self.calls.append(call)
            time.sleep(0.02)

    side = object.__new__(worker._Side)
    side.subject, side.calls = Subject(), 0
    assert 0.02 <= side.run() < 0.2
    assert side.subject.calls == list(range(len(side.subject.calls)))  # no input twice
    assert 2 < len(side.subject.calls) <= 1 + worker.LONG_ENOUGH / 0.02
    monkeypatch.setattr(worker, "LONG_ENOUGH", 0.0)
    before = len(side.subject.calls)
    side.run()
    assert len(side.subject.calls) == before + 1


def test_making_weights_does_not_count(monkeypatch):
    class Subject:
        def load(self):
            np.ones(10**8)  # 0.8 GB, gone when it returns

        def peak_bytes(self):
            return None

    side = object.__new__(worker._Side)
    side.subject = Subject()
    side.load()
    with open("/proc/self/status") as file:
        now = int(next(line for line in file if line.startswith("VmRSS")).split()[1]) * 1024
    assert side.peak_bytes() < now + 4e8
