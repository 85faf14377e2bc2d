"""Random weights: reproducible, and without neutral values."""

import jax
import numpy as np

from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.random_weights import random_weight


def test_nothing_is_neutral():
    for path, leaf in jax.tree.leaves_with_path(random_weights.make("tiny").params):
        values = np.asarray(leaf)
        assert np.isfinite(values).all() and values.std() > 1e-3, path


def test_seeds_differ():
    first, second = (random_weights.make("tiny", seed=s).params["dit"] for s in (0, 1))
    assert (np.asarray(first["final_table"]) != np.asarray(second["final_table"])).all()


def test_few_distinct_values_are_repeated():
    kind = dict(path="dit/proj_out/kernel", shape=(5, 8), seed=3, dtype=np.dtype("float32"))
    whole, few = random_weight(**kind), random_weight(**kind, distinct=16)
    np.testing.assert_array_equal(whole, random_weight(**kind))
    np.testing.assert_array_equal(few.ravel()[:16], whole.ravel()[:16])
    np.testing.assert_array_equal(few.ravel(), np.resize(whole.ravel()[:16], 40))
