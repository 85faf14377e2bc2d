"""The training loop: one step in flight while the host reads the metrics of the one before.

step = jit_step(step, state)
with Checkpoints(workdir, config, data) as checkpoints:
    state = checkpoints.restore(abstract, batches) or create()
    with MetricsWriter(workdir, int(state.step), loop.steps) as writer:
        state = fit(step, state, batches, mesh, loop, checkpoints, writer, on_images=draw)
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
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

PROFILED = range(10, 15)  # steps of a run, counted from where it starts


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to do how often, in steps; 0: never."""

    steps: int
    log_every: int = 50
    checkpoint_every: int = 1000
    images_every: int = 0
    evaluate_every: int = 0
    max_streak: int = 20  # updates skipped in a row before the run stops itself
    watchdog_seconds: float = 1800.0  # without a step or a hook's end, after the first; 0: for ever
    profile: bool = False  # steps 10 to 15 into workdir/profile

    def __post_init__(self):
        every = "log_every", "checkpoint_every", "images_every", "evaluate_every"
        for name in (*every, "max_streak", "watchdog_seconds"):
            at_least(name, getattr(self, name), 0)


def compile_step(step: Callable[..., Any], state: TrainState) -> Any:
    """The step under jit, its state donated and left where it is, `skipped` and `streak` reported.

    Args:
      step: (state, batch, *inputs) -> (state, metrics), the metrics scalars.
      state: one with shardings; abstract will do.
    """

    def reporting(state: TrainState, batch: Any, *inputs: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, batch, *inputs)
        return state, metrics | {"skipped": state.skipped, "streak": state.streak}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(reporting, donate_argnums=0, out_shardings=(shardings, None))


def jit_step(step: Callable[..., Any], state: TrainState, *inputs: Any) -> Step:
    """`compile_step` for `fit`.

    `inputs` are trees that no step changes, such as the weights of a frozen network; as arguments
    they are not constants of the program.
    """
    compiled = compile_step(step, state)
    return lambda state, batch: compiled(state, batch, *inputs)


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
    """Trains from `state.step` to `config.steps`.

    SIGTERM and Ctrl-C end it after the step that runs, with a checkpoint; a second one at once.

    Args:
      step: of `jit_step`; it consumes its state.
      state: where to start.
      batches: this host's rows of each batch, as trees of NumPy arrays, for ever; `get_state`
        says where it is.
      mesh: the batch's first axis is split over its batch axes.
      config: how long and how often.
      checkpoints: saves every `checkpoint_every` steps and at the end.
      writer: takes a row every `log_every` steps: means since the last row of all that the steps
        returned but those that were skipped; `images_per_second` without pauses for checkpoints
        and hooks; `data_wait`, the share of time that the device waited for data;
        `checkpoint_seconds` and `hook_seconds` of pauses; `compile_seconds` where a batch had a
        new shape.
      on_images, on_evaluate: called with the state, which they must not keep, and the step;
        the latter after the last step too, where it is called at all. They write pictures, and a
        row with `held_out_loss`: a run that goes on calls them where the writer misses these.
      peak_rate: images/s of devices that do nothing but the networks' FLOPs at their peak; `mfu` in
        the rows is the share of it that was reached.

    Raises:
      Stopped: after a signal, when all is saved.
      Retry: the metrics, the checkpoints or what a hook makes cannot be written.
      DoNotRetry: `max_streak` updates in a row were skipped, or the data has too many bad records.
      UserError: the data ends, or a batch does not split over the devices.
    """
    hooks = on_images, on_evaluate
    run = _Run(state, config, checkpoints, writer, hooks, Meter(peak_rate))
    return run.train(step, batches, mesh)


class _Run:
    """A call of `fit`: where it is, and the pieces of its loop in the order of their use."""

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
        # The number, the metrics and the rows of the step in flight.
        self._pending: tuple[int, Metrics, int] | None = None

    def train(self, step: Step, batches: Iterator[Any], mesh: Mesh) -> TrainState:
        config, writer = self._config, self._writer
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopSignal(mesh))
            stack.enter_context(self._dog)
            source = stack.enter_context(Prefetch(batches, mesh))
            profile = stack.enter_context(_Profile(config.profile and self._workdir, self._done))

            # Hooks of the step that the run goes on from: a crash may have cut them short.
            position = source.position
            if writer and 0 < self._done < config.steps:
                self._call_hooks(but=writer.made)

            # Steps: one is in flight while the host reads the metrics of the one before.
            while self._done < config.steps and not stop.agreed():
                taken = self._take(source, stop)
                if taken is None:
                    break
                profile.at(self._done, self._pending)
                self._dispatch(step, taken)
                position = taken.position
                # Before the hooks, which may take minutes, or fail each time.
                self._save_if_due(position)
                self._call_hooks()

            # The end, or a signal; one that comes while the last state is saved counts too.
            self._read_pending()
            self._save_last(position)
            if self._done < config.steps or stop.agreed(now=True):
                saved = self._checkpoints and "saved, the same command goes on from there"
                raise Stopped(
                    f"{stop.name} after step {self._done} of {config.steps}: {saved or 'not saved'}"
                )
        return self._state

    def _take(self, source: Prefetch, stop: StopSignal) -> Taken | None:
        """The next batch, or None after a signal."""
        try:
            return source.take(self._is_busy, stop)
        except DoNotRetry as error:  # too many bad records, maybe on this host alone
            good = _last_good(self._checkpoints, wait=jax.process_count() == 1)
            raise DoNotRetry(f"{error}; {good}") from error

    def _is_busy(self) -> bool:
        if self._pending is None:
            return False
        return not all(x.is_ready() for x in jax.tree.leaves(self._pending[1]))

    def _dispatch(self, step: Step, taken: Taken) -> None:
        """Starts a step, and reads the one before it."""
        began = time.monotonic()
        with jax.profiler.StepTraceAnnotation("train", step_num=self._done):
            self._state, metrics = step(self._state, taken.batch)
        self._meter.dispatched(taken.batch, time.monotonic() - began, taken.waited)
        self._read_pending()
        self._done += 1
        self._pending = self._done, metrics, taken.rows

    def _read_pending(self) -> None:
        """Waits for the step in flight and takes in what it returned."""
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
            if not self._meter.streak:  # or the last good one could be pushed out
                self._pause("checkpoint", checkpoints.save, self._done, self._state, position)

    def _call_hooks(self, but: Collection[str] = ()) -> None:
        """Calls those that are due after the last step, but for what has been made."""
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
        """Calls what is no step, and counts its time as such."""
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
    """A context that traces the steps of PROFILED, counted from `start`, into a folder."""

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
        """Before step `step` is dispatched; `pending` is what the one before returns."""
        if self._folder and step == self._first:
            jax.block_until_ready(pending)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif self._on and step == self._last:
            jax.block_until_ready(pending)
            self._stop()

    def _stop(self) -> None:
        """A trace that cannot be written ends no training, nor hides why one ends."""
        self._on = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # XLA writes it, and raises the latter
            logging.error("there is no profile in %s: %s", self._folder, error)


def _last_good(checkpoints: Checkpoints | None, wait: bool = True) -> str:
    """`wait` for the one that is being saved, which all hosts have to do."""
    if checkpoints and wait:
        checkpoints.wait()
    good = checkpoints.last_good if checkpoints else None
    where = "none" if good is None else f"step {good} in {checkpoints.folder}"
    return f"the last good checkpoint is {where}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
