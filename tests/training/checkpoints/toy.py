"""A small state, and its checkpoints: made, restored and compared."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.training import state
from sana_jax.training.checkpoints.manager import Checkpoints

CONFIG = {"steps": 10, "model": {"width": 64}, "rate": 0.5, "sizes": (1, 2), "log_every": 3}

DATA = {"files": ["a"], "seed": 3}


class Position:
    """A data iterator that only keeps its position."""

    def __init__(self, value=None):
        self.value = value

    def set_state(self, value):
        self.value = value


def make(seed=0, mesh=None):
    """Returns a state whose arrays compress badly, so that the files hold their bits."""
    w = jax.random.normal(jax.random.key(seed), (64, 128))
    params = {"net": {"w": w, "b": w[0].astype(jnp.bfloat16)}}
    moments = jax.tree.map(jnp.copy, params)
    made = state.new_state(params, {"mu": moments}, jax.random.key(seed))
    if mesh is None:
        return made
    where = {2: NamedSharding(mesh, P("fsdp", "tensor")), 1: NamedSharding(mesh, P("fsdp"))}
    return jax.tree.map(
        lambda x: jax.device_put(x, where.get(x.ndim, NamedSharding(mesh, P()))), made
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
    def bits(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        jax.tree.leaves(jax.tree.map(lambda x, y: bits(x) == bits(y), a, b))
    )


def restore(folder, config=CONFIG, data=DATA, like=None):
    position = Position()
    with Checkpoints(folder, config, data) as checkpoints:
        found = checkpoints.restore(abstract(like or make()), position)
        return found, position.value, checkpoints
