"""Repairs of Orbax 0.12: its clock, and what it prints.

Its futures measure their time limits with time.time(): where the clock is set forward while a save
runs, the save fails, and where it is set back, it may never end. And what fails in its threads is
printed with tracebacks, though it is raised again where it is handled.
"""

import logging as standard_logging
import sys
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

import orbax.checkpoint
from absl import logging


class SteadyTime:
    """Stands for the module `time`, with a time() that no change of the clock moves."""

    _offset = time.time() - time.monotonic()  # what it returns still looks like a date

    def time(self) -> float:
        return self._offset + time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def steady(modules: dict[str, ModuleType], package: str) -> None:
    """Gives the modules of a package that import `time` a clock that only goes forward."""
    for name, module in list(modules.items()):
        if name.startswith(f"{package}.") and vars(module).get("time") is time:
            vars(module)["time"] = SteadyTime()


class _OneLine(standard_logging.Filter):
    """Leaves the tracebacks of Orbax out."""

    def filter(self, record: standard_logging.LogRecord) -> bool:
        if "/orbax/" in record.pathname:
            record.exc_info = None
        return True


def is_raised_elsewhere(record: standard_logging.LogRecord) -> bool:
    """Returns True for asyncio's report of a task of Orbax whose error nobody asked for.

    Where arrays cannot be read, the error of the first is raised, and the others' are reported.
    """
    trace = record.exc_info[2] if record.exc_info else None
    while trace and "/orbax/" not in trace.tb_frame.f_code.co_filename:
        trace = trace.tb_next
    return trace is not None


def is_late(error: BaseException | None, trace: TracebackType | None) -> bool:
    """Returns True for the error of a result that nobody waits for any more.

    Where one of the writes of a save fails, Orbax closes the event loop that waits for all of
    them; TensorStore then finds it closed, once for each of the others.
    """
    if type(error) is not RuntimeError or str(error) != "Event loop is closed" or not trace:
        return False
    return trace.tb_frame.f_code.co_name == "call_soon_threadsafe"


def quiet(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Returns a sys.unraisablehook that leaves errors out for which `is_late`."""

    def unraisable(found: Any) -> None:
        if not is_late(found.exc_value, found.exc_traceback):
            hook(found)

    return unraisable


def repair() -> None:
    """Makes the repairs, in this process. Call it once."""
    steady(sys.modules, orbax.checkpoint.__name__)
    logging.get_absl_logger().addFilter(_OneLine())
    standard_logging.getLogger("asyncio").addFilter(lambda found: not is_raised_elsewhere(found))
    sys.unraisablehook = quiet(sys.unraisablehook)
