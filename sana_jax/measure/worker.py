"""Runs one side of a measurement in a process of its own.

So the weights, threads and memory of one side do not disturb the other, torch stays out of our
process, and the peak of resident memory belongs to one side only. The parent asks, the worker
answers.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from multiprocessing import resource_tracker
from typing import Any

from sana_jax.measure.inputs import Settings
from sana_jax.runtime.errors import UserError

LONG_ENOUGH = 0.3  # seconds; a faster part runs more than once
MOST_CALLS = 50  # in one measurement of a fast part
FAREWELL = 10  # seconds that an idle worker may take to end


class Worker:
    """The parent's end; the kinds are `ours`, `diffusers` and `memory`.

    As a context manager it ends the process.
    """

    def __init__(self, kind: str, settings: Settings):
        self.kind, self.part, self._busy = kind, settings.part, False
        context = multiprocessing.get_context("spawn")
        self._connection, end = context.Pipe()
        arguments = kind, settings, end
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        resource_tracker.ensure_running()  # which would let signals through again
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self._process.start()  # it never hears Ctrl-C, on which the parent acts
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        end.close()

    def send(self, question: str, *arguments) -> None:
        """Asks the worker to call its method `question`; `receive` returns the answer."""
        self._busy = True
        # `receive` notices if the worker is dead.
        with contextlib.suppress(OSError):
            self._connection.send((question, *arguments))

    def receive(self) -> Any:
        """Waits for the answer. Raises UserError if the worker died or reports one.

        Raises RuntimeError, with the worker's traceback, for any other error in it.
        """
        try:
            status, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            reason = f"{self.part}, {self.kind}: the process died with status {code}"
            if code == -signal.SIGKILL:
                reason += ": too little memory, most likely; give a smaller --size or --batch_size"
            raise UserError(reason) from None
        self._busy = False
        if status == "user":
            raise UserError(f"{self.part}, {self.kind}: {answer}")
        if status == "bug":
            raise RuntimeError(f"{self.part}, {self.kind}:\n{answer}")
        return answer

    def ask(self, question: str, *arguments) -> Any:
        """Sends a question and returns its answer."""
        self.send(question, *arguments)
        return self.receive()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, at once if it is busy. May be called again."""
        self._connection.close()
        if self._busy:
            self._process.kill()
        self._process.join(FAREWELL)
        self._process.kill()


def _serve(kind: str, settings: Settings, connection) -> None:
    os.dup2(2, 1)  # the parent's output is a table, without notes of libraries
    try:
        # The main module may have imported JAX already, which then has read its variables.
        import jax

        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two processes share a device
        if kind == "diffusers":
            jax.config.update("jax_platforms", "cpu")  # JAX only lends its tables of names there
        jax.config.update("jax_enable_compilation_cache", False)  # it would hide compilation
        answers = _Memory(settings) if kind == "memory" else _Side(kind, settings)
        while True:
            question, *arguments = connection.recv()
            connection.send(("ok", getattr(answers, question)(*arguments)))
    except (EOFError, ConnectionError):
        pass  # the parent is done or dead
    except UserError as error:
        connection.send(("user", str(error)))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error):
            reason = str(error).strip().splitlines()[0]
            connection.send(("user", f"{kind}: the device has too little memory: {reason:.200}"))
        else:
            connection.send(("bug", traceback.format_exc()))
        sys.exit(1)


class _Memory:
    def __init__(self, settings: Settings):
        self.settings = settings

    def analyse(self) -> dict[str, Any]:
        from sana_jax.measure import memory

        return memory.analyse(self.settings)


class _Side:
    """The answers of a worker of kind `ours` or `diffusers`."""

    def __init__(self, kind: str, settings: Settings):
        if kind == "ours":
            from sana_jax.measure.ours import Ours as Subject
        else:
            from sana_jax.measure.theirs import Diffusers as Subject
        self.subject, self.calls = Subject(settings), 0

    def load(self) -> None:
        self.subject.load()
        with contextlib.suppress(OSError):  # making weights took more memory than they do
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak of resident memory

    def describe(self) -> dict[str, Any]:
        return self.subject.describe()

    def peak_flops(self) -> float:
        return self.subject.peak_flops()

    def first(self):
        """Returns the seconds of the first call, compilation included, and its result."""
        start = time.perf_counter()
        out = self._call()
        return time.perf_counter() - start, self.subject.to_numpy(out)

    def run(self) -> float:
        """Returns the seconds of a call; for fast calls the mean of several, after a first one."""
        start = time.perf_counter()
        self._call()
        seconds = time.perf_counter() - start
        calls = min(MOST_CALLS, int(LONG_ENOUGH / seconds))
        if calls < 2:
            return seconds
        start = time.perf_counter()
        for _ in range(calls):
            self._call()
        return (time.perf_counter() - start) / calls

    def peak_bytes(self) -> int:
        """Returns the peak of the device's memory; if that is the host's, of resident memory."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self.subject.peak_bytes() or resident

    def _call(self):
        self.calls += 1
        return self.subject.run(self.calls - 1)
