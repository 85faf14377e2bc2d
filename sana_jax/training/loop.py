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

from sana_jax.arguments import at_least
from sana_jax.checkpoints.training import Checkpoints
from sana_jax.errors import DoNotRetry, Stopped
from sana_jax.files import storage
from sana_jax.training.meter import Meter
from sana_jax.training.metrics_writer import MetricsWriter
from sana_jax.training.prefetch import Prefetch
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
    done, pending, meter = int(state.step), None, Meter(peak_rate)
    workdir = writer and writer.workdir

    def read_pending():
        """Waits for the step in flight and takes in what it returned."""
        nonlocal pending
        if pending is None:
            return
        step_read, metrics, rows = pending
        pending = None
        meter.read(metrics, rows)
        dog.beat()
        if writer:
            writer.tick()
            if _due(step_read, config.log_every) or step_read == config.steps:
                with storage(workdir):
                    writer.write(step_read, meter.row())
        if config.max_streak and meter.streak >= config.max_streak:
            raise DoNotRetry(
                f"{meter.streak} updates in a row, up to step {step_read}, were not finite and left"
                f" out; {_last_good(checkpoints)}"
            )

    def is_busy() -> bool:
        return pending is not None and not all(x.is_ready() for x in jax.tree.leaves(pending[1]))

    def pause(name: str, action: Callable, *args):
        began = time.monotonic()
        with storage(workdir):
            action(*args)
        meter.paused(name, time.monotonic() - began)
        dog.beat()

    def call_hooks(but: Collection[str] = ()):
        """Those that are due after step `done`, but for what has been made."""
        last = bool(config.evaluate_every) and done == config.steps
        for name, hook, due in (
            ("images", on_images, _due(done, config.images_every)),
            ("held_out", on_evaluate, _due(done, config.evaluate_every) or last),
        ):
            if hook and due and name not in but:
                read_pending()
                pause("hook", hook, state, done)

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal(mesh))
        dog = stack.enter_context(Watchdog(config.watchdog_seconds))
        source = stack.enter_context(Prefetch(batches, mesh))
        profile = stack.enter_context(_Profile(config.profile and workdir, done))
        position = source.position
        if writer and 0 < done < config.steps:  # a crash may have cut the hooks of this step short
            call_hooks(but=writer.made)
        while done < config.steps and not stop.agreed():
            try:
                taken = source.take(is_busy, stop)
            except DoNotRetry as error:  # too many bad records, maybe on this host alone
                good = _last_good(checkpoints, wait=jax.process_count() == 1)
                raise DoNotRetry(f"{error}; {good}") from error
            if taken is None:
                break
            profile.at(done, pending)
            began = time.monotonic()
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                state, metrics = step(state, taken.batch)
            meter.dispatched(taken.batch, time.monotonic() - began, taken.waited)
            read_pending()  # of the step before: this one is in flight
            done, position = done + 1, taken.position
            pending = done, metrics, taken.rows
            # Before the hooks, which may take minutes, or fail each time.
            if checkpoints and _due(done, config.checkpoint_every) and done < config.steps:
                read_pending()
                if not meter.streak:  # or the last good one could be pushed out
                    pause("checkpoint", checkpoints.save, done, state, position)
            call_hooks()
        read_pending()
        if checkpoints:
            with storage(workdir):
                checkpoints.save_surely(done, state, position, good=not meter.streak)
        # A signal while the last state was saved counts too.
        if done < config.steps or stop.agreed(now=True):
            saved = "saved, the same command goes on from there" if checkpoints else "not saved"
            raise Stopped(f"{stop.name} after step {done} of {config.steps}: {saved}")
    return state


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
