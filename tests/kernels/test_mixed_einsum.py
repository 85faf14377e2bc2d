"""Products of narrow numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.mixed_einsum import dense_float32
from tests import toy


@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 64), (1, 1, 64), (64,)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_float32(shape, dtype):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape), rng.standard_normal((64, 32))
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    found = jax.jit(dense_float32)(x, kernel)
    assert found.dtype == dtype
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    # Half a unit in the last place of the result is all that may be lost.
    tolerance = 1e-6 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    toy.assert_close(found.astype(jnp.float32), expected, tolerance)


def test_the_sum_is_wider_than_the_operands():
    """4096 ones: a bfloat16 sum would stop at 256."""
    x, kernel = jnp.ones((2, 4096), jnp.bfloat16), jnp.ones((4096, 3), jnp.bfloat16)
    out = jax.jit(dense_float32)(x, kernel)
    np.testing.assert_array_equal(out.astype(jnp.float32), 4096.0)


def test_dense_float32_can_be_differentiated():
    x, kernel = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)

    def loss(x, kernel):
        return jnp.sum(dense_float32(x, kernel).astype(jnp.float32))

    d_x, d_kernel = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    assert d_x.dtype == d_kernel.dtype == jnp.bfloat16
    assert (d_x == 4).all() and (d_kernel == 2).all()
