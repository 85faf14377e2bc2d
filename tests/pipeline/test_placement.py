"""Batches over a mesh, and the settings of JAX inside a pipeline's calls alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.pipeline import placement
from sana_jax.pipeline.placement import Placement
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import toy


def place(devices: int, dtype: str = "float32") -> Placement:
    return Placement(make_mesh(devices=toy.devices(devices)), dtype)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("rows, padded", [(1, 4), (4, 4), (6, 8)])
def test_a_batch_is_split_and_padded_with_its_last_row(of, rows, padded):
    x = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    found = place(4).spread(of(x))
    assert found.shape == (padded, 3) and len(found.sharding.device_set) == 4
    np.testing.assert_array_equal(found[:rows], x)
    np.testing.assert_array_equal(found[rows:], np.repeat(x[-1:], padded - rows, axis=0))


def test_the_mesh_and_the_precision_are_set_inside_alone():
    before = jax.config.jax_default_matmul_precision
    for dtype in "float32", "bfloat16":
        with jax.default_matmul_precision("default"), place(2, dtype).context():
            assert not jax.sharding.get_abstract_mesh().empty
            inside = jax.config.jax_default_matmul_precision
        assert (inside == "float32") == (dtype == "float32")
        assert jax.sharding.get_abstract_mesh().empty
    assert jax.config.jax_default_matmul_precision == before


def test_a_fork_is_refused(monkeypatch):
    placed = place(1)
    monkeypatch.setattr(placement.os, "getpid", lambda: -1)
    with pytest.raises(UserError, match="start processes by spawn"):
        placed.spread(np.zeros((1, 2)))
