"""SIGTERM and Ctrl-C as requests that the loop fulfils after the current step."""

import signal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIGNALS = signal.SIGTERM, signal.SIGINT


class StopSignal:
    """A context in which a first signal is noted, and a second ends the process at once.

    One host alone may get the signal; `agreed` becomes true on all hosts after the same step.

    Attributes:
      name: the signal, for messages; "stopped" where another host got it.
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
        """Returns whether a signal came to this host, if it is the only one."""
        return self._raised and jax.process_count() == 1

    def agreed(self, now: bool = False) -> bool:
        """Returns whether to stop before the next step; every host asks before every step.

        With several hosts the answer is that of the step before, so that no host waits; with `now`
        they wait for the current answer.
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
