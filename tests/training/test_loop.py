"""The loop in this process: skipped updates, hooks, rows, profile. test_resume.py has the rest."""

import ctypes
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sana_jax import sharding
from sana_jax.runtime.errors import DoNotRetry, Retry
from sana_jax.training import command, state
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.loop import LoopConfig, _Profile, fit, in_turns, jit_step
from sana_jax.training.metrics_writer import MetricsWriter
from tests.training.toy_loop import Batches, init, rows, run, step


def test_rows_hooks_and_checkpoints(tmp_path):
    seen = []
    config = LoopConfig(10, log_every=4, checkpoint_every=3, images_every=5, evaluate_every=6)
    done, checkpoints = run(
        tmp_path,
        Batches(),
        config,
        on_images=lambda s, k: seen.append(("images", k, float(s.params["w"][0]))),
        on_evaluate=lambda s, k: seen.append(("evaluate", k, float(s.params["w"][0]))),
    )
    assert done.params["w"].tolist() == [45.0] * 4
    assert seen == [
        ("images", 5, 10.0),
        ("evaluate", 6, 15.0),
        ("images", 10, 45.0),
        ("evaluate", 10, 45.0),  # at the end too
    ]
    assert checkpoints.steps() == [3, 6, 9, 10] and checkpoints.last_good == 10
    found = rows(tmp_path)
    assert [(row["step"], row["loss"], row["half"]) for row in found] == [
        (4, 1.5, 0.75), (8, 5.5, 2.75), (10, 8.5, 4.25)
    ]  # fmt: skip
    assert "compile_seconds" in found[0] and "compile_seconds" not in found[1]
    assert {"checkpoint_seconds", "hook_seconds"} <= found[1].keys()
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait"] <= 1 for row in found)


def test_steps_take_turns_from_the_step_that_a_run_goes_on_from():
    told = []
    steps = [lambda state, batch, name=name: told.append((name, batch)) for name in "ab"]
    step = in_turns(steps, first=3)
    for batch in range(3):
        step(None, batch)
    assert told == [("b", 0), ("a", 1), ("b", 2)]


def test_hooks_that_a_crash_cut_short_are_made_up_for(tmp_path):
    """The step's checkpoint is saved before its hooks; what they have made is not made twice."""
    abstract, create = state.on_mesh(init, sharding.make_mesh(fsdp=2))
    config = LoopConfig(4, checkpoint_every=2, images_every=2, evaluate_every=2)
    called, tries = [], iter([2, 1, 0])

    def go_on():
        crashes_at = next(tries)
        with Checkpoints(tmp_path, {}, {}, keep=99) as checkpoints:
            batches = Batches()
            begun = checkpoints.restore(abstract, None) or create()
            batches.number = int(begun.step)
            with MetricsWriter(tmp_path, int(begun.step), config.steps) as writer:

                def draw(s, k):
                    if crashes_at == 2:
                        raise RuntimeError("a crash")
                    called.append(("images", k, float(s.params["w"][0])))
                    writer.images(k, "samples", [[np.zeros((2, 2, 3), np.uint8)]])

                def evaluate(s, k):
                    if crashes_at:
                        raise RuntimeError("a crash")
                    called.append(("evaluate", k, float(s.params["w"][0])))
                    writer.write(k, {"held_out_loss": 1.0})

                mesh = sharding.make_mesh(fsdp=2)
                given = jit_step(step, abstract), begun, batches, mesh, config, checkpoints, writer
                fit(*given, on_images=draw, on_evaluate=evaluate)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="a crash"):
            go_on()
    go_on()
    assert called == [
        ("images", 2, 1.0),
        ("evaluate", 2, 1.0),
        ("images", 4, 6.0),
        ("evaluate", 4, 6.0),
    ]


def test_batch_with_nan_is_left_out(tmp_path):
    clean, _ = run(tmp_path / "a", Batches(), LoopConfig(8, log_every=2))
    done, _ = run(tmp_path / "b", Batches(nan_at=(2, 3, 5)), LoopConfig(8, log_every=2))
    assert done.params["w"].tolist() == [28.0 - 10] * 4 == done.opt_state["total"].tolist()
    assert (int(done.step), int(done.skipped), int(done.streak)) == (8, 3, 0)
    assert int(clean.skipped) == 0
    found = [(row["step"], row.get("loss"), row["skipped"]) for row in rows(tmp_path / "b")]
    assert found == [(2, 0.5, 0), (4, None, 2), (6, 4.0, 3), (8, 6.5, 3)]


def test_streak_of_nan_stops_the_run(tmp_path):
    config = LoopConfig(20, checkpoint_every=2, max_streak=4)
    with pytest.raises(DoNotRetry, match="4 updates in a row, up to step 11, .* is step 6 in "):
        run(tmp_path, Batches(nan_at=range(7, 20)), config)
    with Checkpoints(tmp_path, {}, {}) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]
        abstract, _ = state.on_mesh(init, sharding.make_mesh())
        assert checkpoints.restore(abstract).params["w"].tolist() == [15.0] * 4


def test_a_hook_without_a_disk_is_worth_a_retry(tmp_path):
    def hook(s, k):
        raise OSError(28, "No space left on device")

    with pytest.raises(Retry, match=f"{tmp_path}: No space left on device"):
        run(tmp_path, Batches(), LoopConfig(20, images_every=3), on_images=hook)


def test_too_many_bad_records_name_the_last_good_step(tmp_path):
    def fail(batch):
        if batch == 5:
            raise DoNotRetry("too many bad records")

    with pytest.raises(DoNotRetry, match="^too many bad records; .* is step 4 in "):
        run(tmp_path, Batches(before=fail), LoopConfig(9, checkpoint_every=2))


@pytest.mark.parametrize("failures, ends", [(2, True), (3, False)])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_last_save_is_tried_again(tmp_path, monkeypatch, failures, ends, stopped):
    save, left = ocp.CheckpointManager.save, [failures]

    def flaky(*args, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    def stop(batch):
        if stopped and batch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ocp.CheckpointManager, "save", flaky)
    config = LoopConfig(6, checkpoint_every=0)
    if not ends:
        with pytest.raises(Retry, match="could not be saved .*newest checkpoint is none"):
            run(tmp_path, Batches(before=stop), config)
    elif stopped:
        with pytest.raises(Retry, match="saved, the same command") as error:
            run(tmp_path, Batches(before=stop), config)
        (step,) = (int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
        assert f"after step {step} of 6" in str(error.value)
    else:
        _, checkpoints = run(tmp_path, Batches(), config)
        assert checkpoints.steps() == [6] and checkpoints.last_good == 6


def test_metrics_are_read_one_step_behind(tmp_path):
    """Step k is dispatched before the host waits for the metrics of step k - 1."""
    mesh, events = sharding.make_mesh(), []

    class Metric:
        """A scalar that says when it is read."""

        def __init__(self, step):
            self.step = step

        def is_ready(self):
            return True

        def __array__(self, *args, **options):
            events.append(("read", self.step))
            return np.zeros(())

    def dispatch(s, batch):
        events.append(("dispatched", int(s.step)))
        zero = jax.numpy.zeros((), int)  # its readiness may be asked, as of a real step
        metrics = {"loss": Metric(int(s.step)), "skipped": zero, "streak": zero}
        return s.replace(step=s.step + 1), metrics

    _, create = state.on_mesh(init, mesh)
    fit(dispatch, create(), Batches(), mesh, LoopConfig(3))
    first = [event for k, event in enumerate(events) if event not in events[:k]]
    assert first == [
        ("dispatched", 0),
        ("dispatched", 1),
        ("read", 0),
        ("dispatched", 2),
        ("read", 1),
        ("read", 2),
    ]


def test_profile(tmp_path, monkeypatch):
    dispatched, marks = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace

    def mark(action):
        return lambda *args: marks.append(len(dispatched)) or action(*args)

    monkeypatch.setattr(jax.profiler, "start_trace", mark(start))
    monkeypatch.setattr(jax.profiler, "stop_trace", mark(stop))
    annotate = jax.profiler.StepTraceAnnotation
    monkeypatch.setattr(
        jax.profiler,
        "StepTraceAnnotation",
        lambda name, step_num: dispatched.append(step_num) or annotate(name, step_num=step_num),
    )
    run(tmp_path, Batches(), LoopConfig(17, profile=True))
    assert dispatched[slice(*marks)] == [10, 11, 12, 13, 14]
    (trace,) = tmp_path.glob("profile/**/*.trace.json.gz")
    assert trace.stat().st_size


def test_a_profile_without_a_disk_ends_no_run(tmp_path, monkeypatch):
    def full():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    with _Profile(tmp_path, 0) as profile:
        profile.at(10, None)
        profile.at(15, None)
    with pytest.raises(Retry), _Profile(tmp_path, 0) as profile:
        profile.at(10, None)
        raise Retry("the disk is full")


def test_joining_the_hosts_keeps_the_handler_of_sigterm(monkeypatch):
    """JAX installs a handler below Python, which does not notice that its own was replaced."""
    ignored = ctypes.c_void_p(int(signal.SIG_IGN))

    def initialize(**settings):
        ctypes.CDLL(None).signal(signal.SIGTERM, ignored)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    caught = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        command.join_hosts()
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_finished_run_does_nothing(tmp_path):
    mesh = sharding.make_mesh()
    abstract, create = state.on_mesh(init, mesh)
    batches = Batches()
    done = fit(None, create().replace(step=jnp.int32(5)), batches, mesh, LoopConfig(5))
    assert int(done.step) == 5
