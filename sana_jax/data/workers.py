"""Processes that make batches, in the order of one: batch i is made by process i mod their number.

They are grain's, started anew (spawned), which end with this one however it ends.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection, process

import grain
from absl import flags

from sana_jax.runtime.errors import Retry


def in_processes(batches: grain.MapDataset, workers: int, prefetch: int) -> grain.IterDataset:
    """Prepares batches ahead, `prefetch` of them, in `workers` processes or, of 0, in threads."""
    if not workers:
        return batches.to_iter_dataset(grain.ReadOptions(prefetch, prefetch))
    if not flags.FLAGS.is_parsed():  # in no command; grain has flags, and reads them here
        flags.FLAGS.mark_as_parsed()
    grain.config.update("py_traceback_filtering", "off")  # its advice would end our messages
    ahead = max(1, prefetch // workers)  # in each process one batch is in the making beside these
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
    made = batches.to_iter_dataset(grain.ReadOptions(1, 1))
    return made.mp_prefetch(options, worker_init_fn=_prepare)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Turns grain's error for a process that was killed into Retry."""
    try:
        yield
    except RuntimeError as error:
        if "Worker process was terminated unexpectedly" not in str(error):
            raise
        raise Retry(
            f"a process of config.loader.workers ended ({str(error).partition('.')[0]}): is there"
            " enough memory, in /dev/shm too?"
        ) from error


def _prepare(number: int, workers: int) -> None:
    """Prepares a process: it leaves signals and devices to the one that started it.

    Of a parent that is killed nothing else would tell it.
    """
    os.setpgid(0, 0)  # Ctrl-C goes to a group
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")

    def watch(parent: process.BaseProcess) -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    if (parent := process.parent_process()) is not None:
        threading.Thread(target=watch, args=[parent], daemon=True).start()
