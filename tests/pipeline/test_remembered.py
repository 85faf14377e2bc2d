"""The cache of a pipeline: how much it keeps, and threads that change it at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

from sana_jax.pipeline.remembered import MOST, Remembered
from tests import PATIENCE

THREADS = 8


def test_oldest_are_forgotten():
    cache, asked = Remembered(), []

    def get(key):
        return cache.of(key, lambda: asked.append(key) or (key,))

    for key in range(MOST):
        assert get(key) == (key,)
    assert get(0) == (0,) and get("new") == ("new",) and get(0) == (0,)
    assert asked == [*range(MOST), "new"]
    assert get(1) == (1,) and asked[-1] == 1 and len(cache) == MOST


def test_threads_may_change_a_cache_at_once():
    cache, start = Remembered(), threading.Barrier(THREADS, timeout=PATIENCE)

    def user(k: int) -> bool:
        start.wait()
        keys = [(i * 7 + k) % 9 for i in range(3000)]
        return all(cache.of(i, lambda i=i: (i,)) == (i,) for i in keys)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(user, range(THREADS)))
    assert len(cache) == MOST
