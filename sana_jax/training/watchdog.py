"""Ends a run that hangs, so that its scheduler can start it again."""

import faulthandler
import os
import sys
import threading

from sana_jax.cli import EXIT_RETRY


class Watchdog:
    """A context; once `beat` was called it must be again within `seconds`, or the process ends.

    Then the stacks of all threads are printed and the status is 75. Before the first beat, while
    the step compiles, there is no limit. 0 seconds: never.
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
        """The run lives."""
        self._beats.set()

    def _watch(self) -> None:
        self._beats.wait()
        while not self._end:
            self._beats.clear()
            if not self._beats.wait(self._seconds) and not self._end:
                faulthandler.dump_traceback(sys.__stderr__)
                print(
                    f"error: no step for {self._seconds:g} s; the stacks of all threads are above",
                    file=sys.__stderr__,
                    flush=True,
                )
                os._exit(EXIT_RETRY)
