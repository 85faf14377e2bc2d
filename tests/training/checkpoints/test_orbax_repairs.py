"""Orbax keeps its time where the clock is moved, and says in one line what fails."""

import asyncio
import gc
import logging
import sys
import threading
import time
import types

import numpy as np
import pytest
import tensorstore as ts
from absl import logging as absl_logging
from orbax.checkpoint._src.asyncio_utils import run_sync
from orbax.checkpoint._src.futures import future, signaling_client

from sana_jax.training.checkpoints import orbax_repairs
from sana_jax.training.checkpoints.manager import Checkpoints


def test_a_clock_that_jumps_fails_no_save(tmp_path, monkeypatch):
    calls, real = 0, time.time

    def jumping():
        nonlocal calls
        calls += 1
        return real() + (1e9 if calls % 2 else -1e9)

    with Checkpoints(tmp_path, {}, {}) as checkpoints:
        monkeypatch.setattr(time, "time", jumping)
        for step in 1, 2:
            checkpoints.save(step, {"x": np.ones(3)})
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.steps() == [1, 2]


def test_only_modules_that_import_the_clock_get_another(monkeypatch):
    ours, other = types.ModuleType("package.a"), types.ModuleType("others.a")
    ours.time = other.time = time
    bare = types.ModuleType("package.b")
    orbax_repairs.steady({"package.a": ours, "package.b": bare, "others.a": other}, "package")
    assert other.time is time and not hasattr(bare, "time")
    before = ours.time.time()
    assert before == pytest.approx(time.time(), abs=60) and ours.time.sleep is time.sleep
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert ours.time.time() >= before


def test_orbax_has_such_modules():
    """Otherwise the repair is no longer needed, or no longer made."""
    counting = future, signaling_client
    assert all(isinstance(module.time, orbax_repairs.SteadyTime) for module in counting)


@pytest.mark.parametrize("path, kept", [("/x/orbax/future.py", False), ("/x/y.py", True)])
def test_threads_of_orbax_say_what_failed_without_tracebacks(path, kept):
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        found = logging.LogRecord("absl", logging.ERROR, path, 1, "failed", (), sys.exc_info())
    assert absl_logging.get_absl_logger().filter(found)
    assert bool(found.exc_info) is kept


@pytest.mark.parametrize("file, kept", [("/x/orbax/serialization.py", False), ("/x/y.py", True)])
def test_arrays_that_cannot_be_read_beside_another_are_not_reported(file, kept):
    """asyncio reports a task whose error nobody asked for, with its traceback."""
    code = compile("async def read():\n    raise ValueError('not found')", file, "exec")
    names, told = {}, []
    exec(code, names)
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("asyncio").addHandler(handler)
    try:

        async def main():
            task = asyncio.ensure_future(names["read"]())
            await asyncio.wait([task])

        asyncio.run(main())
        gc.collect()
    finally:
        logging.getLogger("asyncio").removeHandler(handler)
    assert bool(told) is kept


@pytest.fixture
def told(monkeypatch):
    """Returns what is raised where nobody can catch it, and printed."""
    told = []
    hook = orbax_repairs.quiet(lambda found: told.append(str(found.exc_value)))
    monkeypatch.setattr(sys, "unraisablehook", hook)
    return told


@pytest.mark.parametrize("printed", [False, True])
def test_results_that_nobody_waits_for_any_more_say_nothing(told, monkeypatch, printed):
    """As of a save one of whose writes failed, while TensorStore goes on with the others."""
    if printed:  # what would be without the repair
        monkeypatch.setattr(orbax_repairs, "is_late", lambda *_: False)
    promise, result = ts.Promise.new()

    async def wait():
        await result

    async def fail():
        raise OSError(28, "No space left on device")

    async def both():
        await asyncio.gather(wait(), fail())

    with pytest.raises(OSError, match="No space left"):
        run_sync(both())
    late = threading.Thread(target=promise.set_result, args=[1])
    late.start()
    late.join()
    assert told == ["Event loop is closed"] * printed


def test_other_errors_that_nobody_catches_are_still_told(told):
    class Broken:
        def __del__(self):
            raise RuntimeError("Event loop is closed")

    Broken()
    assert told == ["Event loop is closed"]
