"""Layers that networks share, against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sana_jax.models.layers import Conv3x3, GLUMBConv, RMSNorm, dense
from tests import toy

TYPES = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def randomised(module, x):
    """Parameters that a wrong formula cannot hide behind, of the shapes that the module has."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
    return jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape)), shapes)


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense(use_bias):
    layer, x = dense(5, ("embed", "mlp"), use_bias=use_bias, **TYPES), normal(2, 3, 4)
    params = randomised(layer, x)
    expected = x @ params["params"]["kernel"]
    if use_bias:
        expected = expected + params["params"]["bias"]
    toy.assert_close(layer.apply(params, x), expected, 1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_weights_of_dense_are_those_that_it_uses(use_bias):
    """The same parameters, whichever of its methods makes them."""
    layer, x = dense(5, ("embed", "mlp"), use_bias=use_bias, **TYPES), normal(2, 4)
    by_call = layer.init(jax.random.key(1), x)
    by_weights = layer.init(jax.random.key(1), 4, method="weights")
    assert jax.tree.structure(by_call) == jax.tree.structure(by_weights)
    jax.tree.map(np.testing.assert_array_equal, by_call, by_weights)
    kernel, bias = layer.apply(by_call, 4, method="weights")
    found = {"kernel": kernel} | ({"bias": bias} if use_bias else {})
    assert use_bias == (bias is not None)
    jax.tree.map(np.testing.assert_array_equal, found, nn.unbox(by_call["params"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas"])
def test_glumbconv_takes_the_kernel_that_is_asked_for(implementation, dtype):
    """With the same parameters whether or not there is one; none is of float16."""
    layer = GLUMBConv(6, dtype=dtype, implementation=implementation)
    x, scale = normal(1, 3, 4, 8), normal(1, 1, 1, 8)
    params = layer.init(jax.random.key(0), x)
    plain = GLUMBConv(6, dtype=dtype, implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, params, plain.init(jax.random.key(0), x))
    program = str(jax.make_jaxpr(layer.apply)(params, x, scale))
    assert ("pallas_call" in program) == (implementation == "pallas" and dtype != "float16")
    found, expected = layer.apply(params, x, scale), plain.apply(params, x, scale)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    toy.assert_close(found.astype(jnp.float32), expected.astype(jnp.float32), tolerance)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("zero_centered", [True, False])
def test_rms_norm(zero_centered, use_bias):
    layer = RMSNorm(1e-2, zero_centered=zero_centered, use_bias=use_bias)
    x = normal(2, 3, 8)
    params = randomised(layer, x)
    expected = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-2)
    expected = expected * (params["params"]["scale"] + zero_centered)
    expected = expected + (params["params"]["bias"] if use_bias else 0)
    toy.assert_close(layer.apply(params, x), expected, 1e-6)


def test_a_convolution_of_twice_the_size():
    x = normal(1, 3, 4, 2)
    layer, doubled = Conv3x3(5), Conv3x3(5, double=True)
    params = randomised(layer, x)
    larger = x.repeat(2, axis=1).repeat(2, axis=2)
    toy.assert_close(doubled.apply(params, x), layer.apply(params, larger), 1e-6)
