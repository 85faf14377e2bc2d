"""Gradients in parts are those of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.runtime.errors import UserError
from sana_jax.training import microbatches


@pytest.mark.parametrize("count", [1, 2, 4])
def test_accumulated_gradients_are_those_of_the_batch(count):
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 5))
    w = jax.random.normal(jax.random.key(1), (5, 5))

    def loss(w, batch):
        x, y = batch
        error = jnp.tanh(x @ w) - y
        return jnp.square(error).mean(), {"mae": abs(error).mean()}

    want = jax.value_and_grad(loss, has_aux=True)(w, (x, y))
    found = jax.jit(microbatches.accumulated_gradients, static_argnums=(0, 3))(
        loss, w, (x, y), count
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, want)


def test_batch_that_does_not_split():
    with pytest.raises(UserError, match="a batch of 8 does not split into 3 microbatches"):
        microbatches.accumulated_gradients(lambda w, b: (w, ()), 1.0, jnp.ones(8), 3)
