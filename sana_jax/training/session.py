"""One session of a training: it starts, or resumes from the newest checkpoint, and trains.

with computing(mesh, dtype):
    abstract, create = on_mesh(init, mesh)
    with Checkpoints(workdir, config, loader.fingerprint) as checkpoints:
        session = Session(checkpoints, loader, mesh, loop)
        state = session.begin(abstract, create)
        state = session.fit(state, [step], on_images=draw)  # draw(writer, state, step number)
        export(model_of(state), workdir / "model")
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.runtime import hosts
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import replace_folder, storage
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.loop import LoopConfig, fit, in_turns, jit_step
from sana_jax.training.metrics_writer import MetricsWriter
from sana_jax.training.state import TrainState
from sana_jax.training.watchdog import Watchdog

Hook = Callable[[MetricsWriter, TrainState, int], None]


class Session:
    """One run of a training in the folder of its checkpoints.

    Attributes:
      first: the step that the run resumes from, 0 for a new training; set by `begin`.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        loader: Iterable[Any],
        mesh: Mesh,
        loop: LoopConfig,
        key: str = "config.recipe.steps",
        name: str = "",
    ):
        """
        Args:
          checkpoints: the training's checkpoints, open.
          loader: its iterator gives this host's rows of each batch, as `loop.fit` takes them.
          mesh: the devices.
          loop: how long to train, and what to do how often.
          key: the name of `loop.steps` in the config, for messages.
          name: the name of this part of the training, such as a phase, for messages.
        """
        self._checkpoints, self._batches = checkpoints, iter(loader)
        self._mesh, self._loop, self._key = mesh, loop, key
        self._label = f"{name}: " if name else ""

    def begin(self, abstract: TrainState, start: Callable[[], TrainState]) -> TrainState:
        """Returns the newest state that was saved or, where there is none, the state of `start`.

        Raises the errors of `Checkpoints.restore`, and UserError where the state has more steps
        than the run is to have.

        Args:
          abstract: the state's shapes, dtypes and shardings.
          start: makes the state of step 0.
        """
        with Watchdog(self._loop.watchdog_seconds):
            state = self._checkpoints.restore(abstract, self._batches) or start()
        self._abstract, self.first, steps = abstract, int(state.step), self._loop.steps
        if self.first > steps:
            raise UserError(
                f"{self._checkpoints.workdir} has {self.first} steps already, more than"
                f" {self._key}={steps}"
            )
        if self.first:
            hosts.log_first_host(f"{self._label}resumed at step {self.first} of {steps}")
        return state

    def fit(
        self,
        state: TrainState,
        steps: Sequence[Callable[..., Any]],
        inputs: Callable[[], tuple[Any, ...]] = tuple,
        on_images: Hook | None = None,
        on_evaluate: Hook | None = None,
        peak_rate: float | None = None,
        images_at_end: bool = False,
    ) -> TrainState:
        """Trains the steps that are left. Raises the errors of `loop.fit`.

        Args:
          state: the state that `begin` returned.
          steps: (state, batch, *inputs) -> (state, metrics), the metrics scalars; not under jit.
            Of several, which take turns, step k of the training is steps[k % count].
          inputs: makes the trees that no step changes, such as the weights of frozen networks.
          on_images, on_evaluate: the hooks of `loop.fit`, called with the writer first.
          peak_rate: images/s at the devices' peak, for `mfu`.
          images_at_end: whether `on_images` is always called after the last step.
        """
        last, folder = self._loop.steps, self._checkpoints.workdir
        if self.first < last:
            hosts.log_first_host(f"{self._label}compiling the step")
        given = inputs()
        compiled = in_turns([jit_step(s, self._abstract, *given) for s in steps], self.first)
        with MetricsWriter(folder, self.first, last) as writer:
            state = fit(
                *(compiled, state, self._batches, self._mesh),
                *(self._loop, self._checkpoints, writer),
                on_images=on_images and partial(on_images, writer),
                on_evaluate=on_evaluate and partial(on_evaluate, writer),
                peak_rate=peak_rate,
            )
            every = self._loop.images_every
            # Where the last step is a multiple of `images_every`, `fit` has called the hook.
            if images_at_end and (not every or last % every):
                with storage(folder):
                    on_images(writer, state, last)
        return state


@contextlib.contextmanager
def computing(mesh: Mesh, dtype: str) -> Iterator[None]:
    """Sets the mesh; for dtype "float32", computes float32 products in full precision.

    With another `dtype` the precision of such products is the device's default.
    """
    precision = "float32" if dtype == "float32" else None
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        yield


def export(model: Checkpoint, folder: Path) -> None:
    """Writes `model`, whose weights every host holds in full, as a native folder; collective.

    A model already in `folder` stays until the new one is complete. Raises Retry on all hosts where
    the folder cannot be written, or is not whole after that.
    """

    def write() -> None:
        with storage(folder), replace_folder(folder) as part:
            native.save(model, part)
        if not native.is_whole(folder):
            raise Retry(f"{folder} is not what was written to it: look at the disk")

    hosts.on_first_host(write)
