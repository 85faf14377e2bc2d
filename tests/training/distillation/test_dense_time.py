"""A network on the scale 0 .. 1: nearly the same velocity, with a tamer derivative in time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.models.dit import SanaTransformer
from sana_jax.training.distillation.dense_time import densify
from tests import toy
from tests.training.distillation.toy import TEACHER, random_params


@pytest.mark.slow  # ten seconds
def test_the_bundled_model_on_the_scale_0_to_1(monkeypatch):
    """A quarter of the steps bring most of it; what stays is what the embedder had between them."""
    monkeypatch.setattr("sana_jax.training.distillation.dense_time.STEPS", 1000)
    whole = open_checkpoint("shapes")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), whole.params["dit"])
    config, found, error = densify(whole.dit, params)
    assert config.timestep_scale == 0.001 and 0 < error < 0.2
    assert {k: v for k, v in found.items() if k != "time_embed"}.keys() == params.keys() - {
        "time_embed"
    }
    rng = np.random.default_rng(0)
    x, caption = rng.standard_normal((4, 4, 4, 32)), rng.standard_normal((4, 6, 192))
    rest, mask = jnp.float32(caption), jnp.ones((4, 6), bool)

    def velocity(config, params, time):
        module = SanaTransformer(config, implementation="xla")
        timestep = 1000 * config.timestep_scale * time
        return module.apply({"params": params}, jnp.float32(x), timestep, rest, mask)

    def of_time(config, params, time):
        move = time, jnp.ones_like(time)
        return jax.jvp(lambda t: velocity(config, params, t), *((a,) for a in move))

    time = jnp.array([0.1, 0.4, 0.7, 0.97])
    (old, fast), (new, slow) = (
        jax.jit(of_time, static_argnums=0)(*given, time)
        for given in ((whole.dit, params), (config, found))
    )
    toy.assert_close(new, old, 0.1)
    assert jnp.linalg.norm(slow[3]) < 0.5 * jnp.linalg.norm(fast[3])


def test_what_is_not_fitted_stays_as_it_is_and_unread(monkeypatch):
    """A conversion keeps every dtype, and has no whole network in memory."""
    monkeypatch.setattr("sana_jax.training.distillation.dense_time.STEPS", 2)
    config = dataclasses.replace(TEACHER, timestep_scale=1.0)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))

    def read(dtype):
        raise AssertionError("a weight was read")

    for name in params.keys() - {"time_embed"}:
        params[name] = jax.tree.map(lambda x: LazyArray(x.shape, x.dtype, read), params[name])
    _, found, _ = densify(config, params)
    changed = {
        name
        for name, before in params["time_embed"].items()
        if before is not found["time_embed"][name]
    }
    assert changed == {"linear_1", "linear_2"}
    assert all(found[name] is params[name] for name in params.keys() - {"time_embed"})
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
