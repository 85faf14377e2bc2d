"""Threads that share a pipeline, as those of a web server do, get what each would get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.pipeline import pipeline, placement
from sana_jax.pipeline.remembered import MOST
from sana_jax.runtime.errors import UserError
from tests import PATIENCE, mini, toy

THREADS, CALLS = 8, 48


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    mini.save(folder)
    mesh = pipeline.sharding.make_mesh(devices=toy.devices(1))
    return SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)


def call(pipe: SanaPipeline, i: int) -> dict[str, np.ndarray]:
    """The results of one user, whose arguments are like no other's; more texts than are kept."""
    seen = []
    pictures = pipe(
        "a thing " * (1 + 40 * (i % 3)),
        negative_prompt=f"no thing number {i % 7}",
        instruction=f"Describe the picture {i % 6} times. " * 5 if i % 2 else None,
        seed=i % 6,
        num_steps=2,
        guidance_scale=3.0,
        height=32,
        width=32 + 32 * (i % 2),
        output="np",
        on_step=(lambda step, x: seen.append((step, np.asarray(x)))) if i % 4 == 3 else None,
    )
    assert [step for step, _ in seen] == ([0, 1] if i % 4 == 3 else [])
    latents = pipe.encode(pictures / np.float32(127.5) - 1)
    embeddings, mask = pipe.encode_prompt(["a thing", "a " * (i % 5)])
    velocity = pipe.velocity(latents, np.float32(500), embeddings[:1], mask[:1])
    found = dict(pictures=pictures, decoded=pipe.decode(latents), velocity=velocity, rows=mask)
    return {name: np.asarray(value) for name, value in found.items()}


def test_threads_get_what_each_would_get_alone(pipe):
    alone = {i: call(pipe, i) for i in range(12)}
    again = [i % 12 for i in range(CALLS)]
    pipe._prefixes.clear()
    pipe._negatives.clear()
    with ThreadPoolExecutor(THREADS) as pool:
        for i, found in zip(again, pool.map(lambda i: call(pipe, i), again), strict=True):
            for name, expected in alone[i].items():
                np.testing.assert_array_equal(found[name], expected, f"{name} of call {i}")
    assert len(pipe._prefixes) <= MOST >= len(pipe._negatives)


def test_a_thread_has_the_settings_of_its_own(pipe):
    """A pipeline sets the mesh for its own call alone."""
    inside, done, seen = threading.Event(), threading.Event(), []

    def wait(step, latents):
        seen.append(jax.sharding.get_abstract_mesh())
        inside.set()
        done.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(pipe, "a", num_steps=1, height=32, width=32, on_step=wait)
        entered, elsewhere = inside.wait(PATIENCE), jax.sharding.get_abstract_mesh()
        done.set()
        drawn.result()
    assert entered and elsewhere.empty and not seen[0].empty


def test_a_fork_is_refused_in_which_jax_would_wait_for_ever(pipe, monkeypatch):
    monkeypatch.setattr(placement.os, "getpid", lambda: -1)
    for use in lambda: pipe("a cat"), lambda: pipe.encode_prompt("a cat"):
        with pytest.raises(UserError, match="start processes by spawn"):
            use()
