"""Hosts, here threads, that meet in a save or learn that one of them failed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from sana_jax.training.checkpoints import barriers
from sana_jax.training.checkpoints.barriers import Barriers, OtherHostFailed
from tests import PATIENCE

HOSTS = 3


class Store:
    """The part of the client of jax.distributed that is used."""

    def __init__(self):
        self.names, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            assert key not in self.names
            self.names[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        assert 0 < milliseconds <= PATIENCE * 1000
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.names, PATIENCE), key
            return self.names[key]

    def key_value_delete(self, folder):
        with self._changed:
            self.names = {key: x for key, x in self.names.items() if not key.startswith(folder)}


@pytest.fixture
def run(monkeypatch):
    """Runs an action(host, barriers) of each host in a thread; returns the results or errors."""
    me = threading.local()
    monkeypatch.setattr(jax, "process_count", lambda: HOSTS)
    monkeypatch.setattr(jax, "process_index", lambda: me.host)
    store = Store()

    def one(host, mine, action):
        me.host = host
        return action(host, mine)

    def run(action, all_of_them=None):
        all_of_them = all_of_them or [Barriers(store) for _ in range(HOSTS)]
        with ThreadPoolExecutor(HOSTS) as pool:
            done = [pool.submit(one, h, mine, action) for h, mine in enumerate(all_of_them)]
        return [future.exception() for future in done], all_of_them

    run.store = store
    return run


def come(mine, *keys):
    for key in keys:
        mine(key=key, timeout_ms=PATIENCE * 1000)


def begin(monkeypatch, number):
    """The hosts of a test are one process, and so share the count of saves."""
    monkeypatch.setattr(Barriers, "_numbers", property(lambda self: iter([number])))


def test_hosts_meet(run, monkeypatch):
    begin(monkeypatch, 0)

    def action(host, mine):
        mine.begin()
        come(mine, "a", "b", "a")

    errors, mine = run(action)
    assert errors == [None] * HOSTS
    begin(monkeypatch, 1)
    assert run(action, mine)[0] == [None] * HOSTS
    assert all("saves/1/" in key for key in run.store.names)  # the first is forgotten


@pytest.mark.parametrize("failing", range(HOSTS))
@pytest.mark.parametrize("skips", [True, False])
def test_all_learn_that_one_failed(run, monkeypatch, failing, skips):
    """It comes to the barrier after the one that others wait at, or says so."""
    begin(monkeypatch, 0)

    def action(host, mine):
        mine.begin()
        come(mine, "start")
        if host == failing and not skips:
            mine.fail()
        come(mine, *(["end"] if host == failing else ["written", "end"]))

    errors, mine = run(action)
    assert all(isinstance(error, OtherHostFailed) for error in errors)
    again, _ = run(lambda host, mine: come(mine, "end"), mine)  # which would wait for nobody
    assert all(isinstance(error, OtherHostFailed) for error in again)
    begin(monkeypatch, 1)

    def next_save(host, mine):
        mine.begin()
        come(mine, "start")

    assert run(next_save, mine)[0] == [None] * HOSTS


def test_one_host_waits_for_nobody():
    mine = Barriers(store=pytest.fail)
    mine.begin()
    mine(key="start", timeout_ms=1)
    mine.fail()


def test_orbax_makes_such_barriers(monkeypatch):
    """Otherwise it waits for minutes at its own."""
    monkeypatch.setattr(barriers.multihost, "get_barrier_sync_fn", lambda processes: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mine = Barriers(Store())
    mine.install()
    assert barriers.multihost.get_barrier_sync_fn(processes={0, 1}) is mine
