"""SIGTERM and Ctrl-C as a wish that the loop grants after the step that runs."""

import signal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIGNALS = signal.SIGTERM, signal.SIGINT


class StopSignal:
    """A context in which a first signal is noted, and a second ends the process at once.

    One host may get the signal alone; `agreed` becomes true on all of them after the same step.
    """

    def __init__(self, mesh: Mesh):
        self.name = "stopped"
        self._raised, self._said = False, None
        self._every = NamedSharding(mesh, P(mesh.axis_names))
        self._local = len(mesh.local_devices)
        self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, P()))
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether this host, being alone, is to stop."""
        return self._raised and jax.process_count() == 1

    def agreed(self, now: bool = False) -> bool:
        """Whether to stop before the next step; every host asks before every step.

        Among several hosts the answer is that of the step before, so that none waits for it; with
        `now` they wait.
        """
        if jax.process_count() == 1:
            return self._raised
        before, flags = self._said, np.full(self._local, self._raised)
        self._said = self._any(jax.make_array_from_process_local_data(self._every, flags))
        said = self._said if now else before
        return said is not None and bool(said)

    def _note(self, number, frame) -> None:
        self._raised, self.name = True, f"stopped by {signal.Signals(number).name}"
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
