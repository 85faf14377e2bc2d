"""Ctrl-C and SIGTERM, from a command's first moment to its last.

While modules are imported and flags are read there is nothing to undo: a signal prints its line and
ends the process at once. It unwinds `main`, so that `finally` blocks run, and then does the same. A
second signal kills. Once `main` has ended, a signal only hurries the process to its end.

Little is imported here: until it is, Python itself answers signals, with tracebacks.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from sana_jax.runtime.errors import EXIT_RETRY

LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# Ctrl-C comes while the program is imported, which cannot tell yet.
TRAININGS = "sana_jax.train", "sana_jax.train_dc_ae"
GRACE_SECONDS = 10.0  # for compilers and other long calls into C++, which no signal can unwind
AGAIN_SECONDS = 0.05

_resumes: bool | None = None
_last: list[Callable[[], object]] = []


def start(resumes: bool) -> None:
    """Lets a signal end the process at once, until `unwound`.

    `resumes`: the same command, run again, goes on where a signal ended it.
    """
    global _resumes
    if _resumes is None:  # the first to be registered is the last to be called, before Python ends
        atexit.register(_install, signal.SIG_IGN)
    _resumes = resumes
    _install(_end)


def at_end(action: Callable[[], object]) -> None:
    """Calls `action` as the process ends, by itself or by a signal, but not by SIGKILL."""
    atexit.register(action)
    _last.append(action)


def unwound(action: Callable[..., object], *arguments: object) -> object:
    """Returns action(*arguments). A signal raises KeyboardInterrupt in it, and ends the process."""
    unwinding = _Unwinding()
    try:
        try:
            value = unwinding.run(action, *arguments)
        finally:
            unwinding.over = True
            _install(_end)
    except BaseException as error:
        if not unwinding.number and not isinstance(error, KeyboardInterrupt):
            raise
        _end(unwinding.number or signal.SIGINT)
    if unwinding.number:
        _end(unwinding.number)
    return value


def finish(status: int) -> None:
    """Lets a signal end the process with `status`, without waiting for threads and devices."""

    def watch(reader: int) -> None:  # the main thread, which waits for threads, may miss a signal
        while os.read(reader, 1)[0] not in LINES:
            pass
        os._exit(status)

    _listen(watch)
    _install(lambda number, frame: os._exit(status))


def _listen(watch: Callable[[int], None]) -> tuple[int, int]:
    """Calls watch(reader) in a thread; from `reader` come the numbers of all signals as bytes.

    Returns the other end of that pipe, and the one that was set before.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=[reader], daemon=True).start()
    return writer, before


def _install(handler: Callable[[int, FrameType | None], object] | int) -> None:
    signal.signal(signal.SIGTERM, handler)
    # A shell makes commands ignore Ctrl-C that it starts in the background.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _end(number: int, frame: FrameType | None = None) -> None:
    """Ends the process, without waiting for threads and devices as the interpreter would."""
    status, line = 128 + number, LINES[signal.Signals(number)]
    if _resumes:
        status, line = EXIT_RETRY, f"{line}; the same command goes on from what is saved"
    with contextlib.suppress(Exception):  # a signal may come in the middle of printing
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    for action in _last:
        with contextlib.suppress(Exception):
            action()
    os._exit(status)


class _Unwinding:
    """One call that a signal unwinds.

    Attributes:
      number: that of the signal, None before.
      over: whether the call has ended.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.over = False
        self._raised = threading.Event()
        self._hook = sys.unraisablehook

    def run(self, action: Callable[..., object], *arguments: object) -> object:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped
        writer, woken = _listen(self._watch)
        signal.signal(signal.SIGALRM, self._again)
        _install(self._first)
        try:
            return action(*arguments)
        finally:
            if sys.unraisablehook == self._dropped:  # modules may have put one before it
                sys.unraisablehook = self._hook
            signal.set_wakeup_fd(woken)
            os.close(writer)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        _install(signal.SIG_DFL)
        self._again(number, frame)

    def _again(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, later if modules are being imported, again if it got lost.

        Modules in C turn it into other errors, and callbacks of the garbage collector drop it.
        """
        if self.over:
            return
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        if not self._is_importing(frame) and not _is_raised():
            self._raised.set()
            raise KeyboardInterrupt

    def _is_importing(self, frame: FrameType | None) -> bool:
        while frame and frame.f_code is not _Unwinding.run.__code__:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def _dropped(self, ignored) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):  # it is raised again
            self._hook(ignored)

    def _watch(self, reader: int) -> None:
        """Ends the process if the main thread, in a long call into C++, does not hear a signal."""
        while byte := os.read(reader, 1):
            number = byte[0]
            if number in LINES and self._is_mine(number) and not self._raised.wait(GRACE_SECONDS):
                if self._is_mine(number) and not self.over:
                    _end(number)
        os.close(reader)

    def _is_mine(self, number: int) -> bool:
        """Returns False in a training's loop, which has handlers of its own."""
        return self.number is not None or signal.getsignal(number) == self._first


def _is_raised() -> bool:
    """Returns True inside the `finally` blocks that a KeyboardInterrupt runs on its way."""
    error = sys.exception()
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
