"""Barriers between the hosts of a save, which end at once where the save fails on one of them.

At Orbax's own barriers hosts wait for one that failed until the time is up, 20 minutes later.
"""

import collections
import itertools
import threading
import time
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax._src import distributed  # Orbax 0.12 takes the store of the hosts from there, too
from orbax.checkpoint._src.multihost import multihost

_FAILED = "failed"


class OtherHostFailed(Exception):
    """A save failed on another host, which logs why."""


class Barriers:
    """The barriers of saves, to be given to Orbax as its `barrier_sync_fn`; nothing for one host.

    The main threads of all hosts come to the barriers of a save in the same order, and so do the
    threads that write. One that failed comes to a later barrier, where others wait at an earlier
    one, or calls `fail`. All notice that.
    """

    _numbers = itertools.count()  # of the saves of a process

    def __init__(self, store: Any = None):
        """`store` has the methods of the client of jax.distributed; default: that client."""
        self._given, self._lock = store, threading.Lock()
        self._folder, self._passed, self._failed = "", collections.Counter(), False

    def install(self) -> None:
        """Lets Orbax 0.12 meet here where it makes a barrier itself, too: as a save begins."""
        if jax.process_count() > 1 and hasattr(multihost, "get_barrier_sync_fn"):
            multihost.get_barrier_sync_fn = lambda *, processes=None: self

    @property
    def _store(self) -> Any:
        return self._given or distributed.global_state.client

    def begin(self) -> None:
        """Begins the next save. Collective, after all hosts are done with the last one."""
        if jax.process_count() == 1:
            return
        if self._folder and jax.process_index() == 0:
            self._store.key_value_delete(self._folder)
        self._folder = f"sana_jax/saves/{next(self._numbers)}/"
        self._passed, self._failed = collections.Counter(), False

    def fail(self) -> None:
        """Tells the other hosts that the save failed on this one."""
        if jax.process_count() > 1 and not self._failed:
            self._failed = True
            for main in True, False:
                self._say(self._next(main), _FAILED)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all hosts have called it with this key.

        Raises OtherHostFailed, and the store's own error where a host does not come in time.
        """
        hosts, host = jax.process_count(), jax.process_index()
        if hosts == 1:
            return
        if self._failed:
            raise OtherHostFailed("the save has failed already")
        main = threading.current_thread() is threading.main_thread()
        end, barrier = time.monotonic() + timeout_ms / 1000, self._next(main)
        if host == 0:
            said = {self._hear(barrier, other, end) for other in range(1, hosts)}
            self._say(barrier, key if said == {key} else _FAILED)
        else:
            self._say(barrier, key)
        if self._hear(barrier, 0, end) != key:
            self._failed = True
            raise OtherHostFailed("another host could not save, and says why")

    def _next(self, main: bool) -> str:
        with self._lock:
            self._passed[main] += 1
            return f"{self._folder}{'main' if main else 'thread'}/{self._passed[main]}/"

    def _say(self, barrier: str, word: str) -> None:
        """Says what the others wait for: the first host speaks last, and for all of them."""
        self._store.key_value_set(f"{barrier}{jax.process_index()}", word)

    def _hear(self, barrier: str, host: int, end: float) -> str:
        milliseconds = max(1, int((end - time.monotonic()) * 1000))
        return self._store.blocking_key_value_get(f"{barrier}{host}", milliseconds)


def make_manager(
    folder: epath.Path, keep: int, keep_every: int | None, barriers: Barriers
) -> ocp.CheckpointManager:
    """Returns Orbax's manager of a folder, whose hosts meet at `barriers`.

    It keeps the newest `keep` steps, and every multiple of `keep_every` if that is given.
    """
    policy = ocp.checkpoint_managers
    kept = [policy.LatestN(keep)]
    if keep_every:
        kept.append(policy.EveryNSteps(keep_every))
    # Named, the hosts meet over the coordinator with a time limit, not on their devices.
    hosts = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(kept),
        save_root_metadata=False,
        create=False,
        multiprocessing_options=hosts,
        async_options=ocp.AsyncOptions(
            barrier_sync_fn=barriers,
            # Otherwise threads wait for minutes for folders that could not be made.
            create_directories_asynchronously=False,
        ),
    )
    return ocp.CheckpointManager(folder, options=options)
