"""A watchdog that ends a run which hangs, so that its scheduler can start it again."""

import faulthandler
import os
import sys
import threading

from sana_jax.runtime.cli import EXIT_RETRY

FIRST_SECONDS = 7200.0  # a large step compiles for long, and its weights may be read from afar


class Watchdog:
    """A context in which `beat` must be called at least every `seconds`, or the process ends.

    In that case it prints the stacks of all threads, and the exit status is 75 (EXIT_RETRY). The
    first beat, before which weights are read or a step compiles, has at least FIRST_SECONDS.
    0 seconds: no limit.
    """

    def __init__(self, seconds: float):
        self._seconds, self._beats, self._end = seconds, threading.Event(), False

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._end = True
        self._beats.set()

    def beat(self) -> None:
        """Tells the watchdog that the run is alive."""
        self._beats.set()

    def _watch(self) -> None:
        seconds = max(self._seconds, FIRST_SECONDS)
        while not self._end:
            if not self._beats.wait(seconds) and not self._end:
                faulthandler.dump_traceback(sys.__stderr__)
                print(
                    f"error: no step for {seconds:g} s; the stacks of all threads are above",
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(EXIT_RETRY)
            self._beats.clear()
            seconds = self._seconds
