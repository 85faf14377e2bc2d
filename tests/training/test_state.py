"""The guard keeps the old state to the bit; the moving average follows its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from sana_jax import sharding
from sana_jax.training import state
from sana_jax.training.optimizers import optimizers


def make():
    params = {"w": jnp.array([1.0, -0.0, 3.0]), "n": jnp.arange(2)}
    return state.new_state(params, {"m": jnp.ones(3)}, jax.random.key(5))


@jax.jit
def advance(s, finite, params):
    return state.advance(
        s,
        finite,
        params=params,
        opt_state={"m": jnp.zeros(3)},
        ema=state.update_ema(s.ema, params, 0.5),
    )


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_applied():
    s = make().replace(streak=jnp.array(2, jnp.int32), skipped=jnp.array(2, jnp.int32))
    after = advance(s, True, {"w": jnp.array([2.0, 2.0, 3.0]), "n": jnp.arange(2) + 1})
    assert after.params["w"].tolist() == [2, 2, 3] and after.opt_state["m"].tolist() == [0, 0, 0]
    assert after.ema["w"].tolist() == [1.5, 1, 3]
    assert (int(after.step), int(after.skipped), int(after.streak)) == (1, 2, 0)


@pytest.mark.parametrize("finite, third", [(False, 3.0), (True, np.nan), (True, -np.inf)])
def test_skipped(finite, third):
    s = make()
    for count in 1, 2:
        s = advance(s, finite, {"w": jnp.array([2.0, 2.0, third]), "n": jnp.arange(2) + 1})
        assert (int(s.step), int(s.skipped), int(s.streak)) == (count,) * 3
    for field in "params", "opt_state", "ema":
        assert bits(getattr(s, field)) == bits(getattr(make(), field))


def test_average_is_that_of_the_formula():
    values = np.random.default_rng(0).normal(size=(30, 4))
    average = wanted = jnp.zeros(4)
    wanted = np.zeros(4)
    for i, value in enumerate(values):
        average = state.update_ema(average, jnp.float32(value), 0.8, jnp.int32(i))
        decay = min(0.8, (1 + i) / (10 + i))
        wanted = decay * wanted + (1 - decay) * value
    np.testing.assert_allclose(average, wanted, rtol=1e-5, atol=1e-6)


def test_average_of_what_stands_still_stands_still():
    value = jax.random.normal(jax.random.key(0), (1000,))
    for step in 0, 7, 1000:
        average = state.update_ema(value, value, 0.9999, jnp.int32(step))
        assert bits(average) == bits(value)


def test_step_keys_differ():
    s = make()
    assert (s.step_key() != s.replace(step=s.step + 1).step_key()).all()


def test_on_mesh():
    """Optimizer state and average are sharded as the parameters are; nothing is ever whole."""
    kernel = nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp"))

    def init():
        params = nn.Dense(8, kernel_init=kernel).init(jax.random.key(0), jnp.ones((1, 8)))["params"]
        tx, _ = optimizers.make_optimizer(optimizers.OptimizerConfig(), params, 10)
        return state.new_state(params, tx.init(params), jax.random.key(1))

    abstract, create = state.on_mesh(init, sharding.make_mesh(fsdp=2, tensor=4))
    made = create()
    assert jax.tree.structure(made) == jax.tree.structure(abstract)
    pairs = [*zip(jax.tree.leaves(made), jax.tree.leaves(abstract), strict=True)]
    assert all((a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding) for a, b in pairs)
    split = [a for a in jax.tree.leaves(made) if a.sharding.spec == P("fsdp", "tensor")]
    assert len(split) == 4  # parameters, two moments, average
