"""The training loop: one step runs while the host reads the metrics of the step before it.

step = jit_step(step, state)
with Checkpoints(workdir, config, data) as checkpoints:
    state = checkpoints.restore(abstract, batches) or create()
    with MetricsWriter(workdir, int(state.step), loop.steps) as writer:
        state = fit(step, state, batches, mesh, loop, checkpoints, writer, on_images=draw)
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from sana_jax.runtime.checks import at_least
from sana_jax.runtime.errors import DoNotRetry, Stopped
from sana_jax.runtime.files import storage
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.meter import Meter
from sana_jax.training.metrics_writer import MetricsWriter
from sana_jax.training.prefetch import Prefetch, Taken
from sana_jax.training.signals import StopSignal
from sana_jax.training.state import TrainState
from sana_jax.training.watchdog import Watchdog

Metrics = dict[str, Any]
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Hook = Callable[[TrainState, int], None]

PROFILED = range(10, 15)  # counted from the step that the run starts from; 10 are to warm up


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """The length of a training and the intervals of its work, in steps; 0: never."""

    steps: int
    log_every: int = 50
    checkpoint_every: int = 1000
    images_every: int = 0
    evaluate_every: int = 0
    max_streak: int = 20  # this many updates skipped in a row end the run; 0: never
    watchdog_seconds: float = 1800.0  # between the ends of steps or hooks at most; 0: no limit
    profile: bool = False  # trace the steps of PROFILED into workdir/profile

    def __post_init__(self):
        every = "log_every", "checkpoint_every", "images_every", "evaluate_every"
        for name in (*every, "max_streak", "watchdog_seconds"):
            at_least(name, getattr(self, name), 0)


def compile_step(step: Callable[..., Any], state: TrainState) -> Any:
    """Returns the step under jit, which reports the state's `skipped` and `streak` as metrics too.

    The step's state is donated; the new one has the same shardings.

    Args:
      step: (state, batch, *inputs) -> (state, metrics), the metrics scalars.
      state: a state whose leaves have shardings; ShapeDtypeStructs suffice.
    """

    def reporting(state: TrainState, batch: Any, *inputs: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, batch, *inputs)
        return state, metrics | {"skipped": state.skipped, "streak": state.streak}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(reporting, donate_argnums=0, out_shardings=(shardings, None))


def jit_step(step: Callable[..., Any], state: TrainState, *inputs: Any) -> Step:
    """Returns `compile_step(step, state)` with its last arguments bound to `inputs`, for `fit`.

    `inputs` are trees that no step changes, such as the weights of a frozen network. They are
    arguments of the program, as constants would be copied into it.
    """
    compiled = compile_step(step, state)
    return lambda state, batch: compiled(state, batch, *inputs)


def in_turns(steps: Sequence[Step], first: int) -> Step:
    """Returns a step for `fit` that starts with step number `first`: step k is steps[k % count]."""
    numbers = itertools.count(first)
    return lambda state, batch: steps[next(numbers) % len(steps)](state, batch)


def fit(
    step: Step,
    state: TrainState,
    batches: Iterator[Any],
    mesh: Mesh,
    config: LoopConfig,
    checkpoints: Checkpoints | None = None,
    writer: MetricsWriter | None = None,
    on_images: Hook | None = None,
    on_evaluate: Hook | None = None,
    peak_rate: float | None = None,
) -> TrainState:
    """Trains from `state.step` to `config.steps`, and returns the last state.

    SIGTERM or Ctrl-C ends the loop after the current step, with a checkpoint; a second signal ends
    the process at once.

    Args:
      step: made by `jit_step`; it consumes its state.
      state: the state to start from.
      batches: an endless iterator over this host's rows of each batch, as trees of NumPy arrays;
        its `get_state`, where it has one, returns its position.
      mesh: the batch's first axis is split over the mesh's batch axes.
      config: how long to train, and what to do how often.
      checkpoints: saves every `checkpoint_every` steps and at the end.
      writer: is given a row every `log_every` steps: the mean of each metric since the last row,
        without skipped updates; `images_per_second` without pauses for checkpoints and hooks;
        `data_wait`, the share of time that the device waited for data; the length of the pauses
        as `checkpoint_seconds` and `hook_seconds`, and `compile_seconds` where a batch had a new
        shape.
      on_images, on_evaluate: called with the state, which they must not keep, and the step;
        `on_evaluate` is called after the last step too, unless `evaluate_every` is 0. The hooks
        write pictures, and a row with `held_out_loss`; a run that resumes calls those hooks whose
        output for its step the writer did not find.
      peak_rate: images/s of devices that do nothing but the networks' FLOPs at their peak; `mfu` in
        the rows is the share of this rate that was reached.

    Raises:
      Stopped: after a signal, when everything is saved.
      Retry: the metrics, the checkpoints or the output of a hook cannot be written.
      DoNotRetry: `max_streak` updates in a row were skipped, or the data has too many bad records.
      UserError: the data ends, or a batch does not split over the devices.
    """
    hooks = on_images, on_evaluate
    run = _Run(state, config, checkpoints, writer, hooks, Meter(peak_rate))
    return run.train(step, batches, mesh)


class _Run:
    """The progress of one call of `fit`, and the parts of its loop in the order of their use."""

    def __init__(
        self,
        state: TrainState,
        config: LoopConfig,
        checkpoints: Checkpoints | None,
        writer: MetricsWriter | None,
        hooks: tuple[Hook | None, Hook | None],
        meter: Meter,
    ):
        self._state, self._done = state, int(state.step)
        self._config, self._checkpoints, self._writer = config, checkpoints, writer
        self._on_images, self._on_evaluate = hooks
        self._meter, self._dog = meter, Watchdog(config.watchdog_seconds)
        self._workdir = writer and writer.workdir
        # The number, the metrics and the row count of the step in flight.
        self._pending: tuple[int, Metrics, int] | None = None

    def train(self, step: Step, batches: Iterator[Any], mesh: Mesh) -> TrainState:
        config, writer = self._config, self._writer
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopSignal(mesh))
            stack.enter_context(self._dog)
            source = stack.enter_context(Prefetch(batches, mesh))
            profile = stack.enter_context(_Profile(config.profile and self._workdir, self._done))

            # Hooks of the step that the run resumes from: a crash may have cut them short.
            position = source.position
            if writer and 0 < self._done < config.steps:
                self._call_hooks(but=writer.made)

            # Steps: one is in flight while the host reads the metrics of the step before it.
            while self._done < config.steps and not stop.agreed():
                taken = self._take(source, stop)
                if taken is None:
                    break
                profile.at(self._done, self._pending)
                self._dispatch(step, taken)
                position = taken.position
                # Save before the hooks, which may take minutes, or fail each time.
                self._save_if_due(position)
                self._call_hooks()

            # The end, or a signal; a signal during the last save counts too.
            self._read_pending()
            self._save_last(position)
            if self._done < config.steps or stop.agreed(now=True):
                saved = self._checkpoints and "saved, the same command goes on from there"
                raise Stopped(
                    f"{stop.name} after step {self._done} of {config.steps}: {saved or 'not saved'}"
                )
        return self._state

    def _take(self, source: Prefetch, stop: StopSignal) -> Taken | None:
        """Returns the next batch, or None after a signal."""
        try:
            return source.take(self._is_busy, stop)
        except DoNotRetry as error:  # too many bad records, perhaps on this host alone
            good = _last_good(self._checkpoints, wait=jax.process_count() == 1)
            raise DoNotRetry(f"{error}; {good}") from error

    def _is_busy(self) -> bool:
        if self._pending is None:
            return False
        return not all(x.is_ready() for x in jax.tree.leaves(self._pending[1]))

    def _dispatch(self, step: Step, taken: Taken) -> None:
        """Starts a step, then reads the metrics of the step before it."""
        began = time.monotonic()
        with jax.profiler.StepTraceAnnotation("train", step_num=self._done):
            self._state, metrics = step(self._state, taken.batch)
        self._meter.dispatched(taken.batch, time.monotonic() - began, taken.waited)
        self._read_pending()
        self._done += 1
        self._pending = self._done, metrics, taken.rows

    def _read_pending(self) -> None:
        """Waits for the step in flight, and takes in the metrics that it returned."""
        if self._pending is None:
            return
        (number, metrics, rows), self._pending = self._pending, None
        config, meter, writer = self._config, self._meter, self._writer
        meter.read(metrics, rows)
        self._dog.beat()
        if writer:
            writer.tick()
            if _due(number, config.log_every) or number == config.steps:
                with storage(self._workdir):
                    writer.write(number, meter.row())
        if config.max_streak and meter.streak >= config.max_streak:
            raise DoNotRetry(
                f"{meter.streak} updates in a row, up to step {number}, were not finite and left"
                f" out; {_last_good(self._checkpoints)}"
            )

    def _save_if_due(self, position: Any) -> None:
        config, checkpoints = self._config, self._checkpoints
        if checkpoints and _due(self._done, config.checkpoint_every) and self._done < config.steps:
            self._read_pending()
            if not self._meter.streak:  # otherwise the last good checkpoint could be pushed out
                self._pause("checkpoint", checkpoints.save, self._done, self._state, position)

    def _call_hooks(self, but: Collection[str] = ()) -> None:
        """Calls the hooks that are due after the last step, except those named in `but`."""
        config, done = self._config, self._done
        last = bool(config.evaluate_every) and done == config.steps
        for name, hook, due in (
            ("images", self._on_images, _due(done, config.images_every)),
            ("held_out", self._on_evaluate, _due(done, config.evaluate_every) or last),
        ):
            if hook and due and name not in but:
                self._read_pending()
                self._pause("hook", hook, self._state, done)

    def _pause(self, name: str, action: Callable[..., Any], *args: Any) -> None:
        """Calls `action`, and counts its time as a pause called `name`."""
        began = time.monotonic()
        with storage(self._workdir):
            action(*args)
        self._meter.paused(name, time.monotonic() - began)
        self._dog.beat()

    def _save_last(self, position: Any) -> None:
        if self._checkpoints:
            good = not self._meter.streak
            with storage(self._workdir):
                self._checkpoints.save_surely(self._done, self._state, position, good=good)


class _Profile:
    """A context that traces the steps of PROFILED, counted from `start`, into workdir/profile."""

    def __init__(self, workdir: Any, start: int):
        self._folder = workdir and str(workdir / "profile")
        self._first, self._last = start + PROFILED.start, start + PROFILED.stop
        self._on = False

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *error) -> None:
        if self._on:
            self._stop()

    def at(self, step: int, pending: Any) -> None:
        """Call before step `step` is dispatched; `pending` is what the step before it returns."""
        if self._folder and step == self._first:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif self._on and step == self._last:
            jax.block_until_ready(pending)
            self._stop()

    def _stop(self) -> None:
        """Stops the trace; one that cannot be written neither ends the run nor hides its error."""
        self._on = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # XLA writes the trace and raises RuntimeError
            logging.error("there is no profile in %s: %s", self._folder, error)


def _last_good(checkpoints: Checkpoints | None, wait: bool = True) -> str:
    """Names the last good checkpoint; `wait` for a save that runs, which is collective."""
    if checkpoints and wait:
        checkpoints.wait()
    good = checkpoints.last_good if checkpoints else None
    where = "none" if good is None else f"step {good} in {checkpoints.folder}"
    return f"the last good checkpoint is {where}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
