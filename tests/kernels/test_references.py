"""The plain operations against their formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.glumbconv.reference import depthwise_conv, glumbconv
from sana_jax.kernels.linear_attention.reference import linear_attention
from tests import toy

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def convolve(x, kernel):
    """Pixel by pixel, from the definition."""
    size = len(kernel)
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    out = np.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.einsum("bhwc,hwc->bc", padded[:, i : i + size, j : j + size], kernel)
    return out


@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 4), (35, 3, 8), (64, 2, 32)])
def test_linear_attention(tokens, heads, width):
    q, k, v = (normal(2, tokens, heads, width) for _ in range(3))
    weights = np.einsum("bnhd,bmhd->bhnm", *(np.maximum(t, 0).astype(np.float64) for t in (q, k)))
    expected = np.einsum("bhnm,bmhe->bnhe", weights, v)
    expected /= np.moveaxis(weights.sum(-1), 1, 2)[..., None] + 1e-15
    toy.assert_close(linear_attention(q, k, v), expected, 1e-6)


def test_linear_attention_of_dead_queries_is_zero():
    q, k, v = (normal(1, 5, 2, 4) for _ in range(3))
    q[0, 3] = -1
    out = linear_attention(q, k, v)
    assert (out[0, 3] == 0).all() and np.isfinite(out).all()


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 1, 9, 2)])
def test_depthwise_conv(shape, size):
    x, kernel = normal(*shape), normal(size, size, shape[-1])
    found = jax.jit(depthwise_conv)(x, kernel)
    toy.assert_close(found, convolve(x.astype(np.float64), kernel.astype(np.float64)), 1e-6)


def test_gradients_of_depthwise_conv():
    """It is linear in either argument: <dy, f(x, k)> gives every gradient, in float64."""
    x, kernel, dy = normal(2, 5, 7, 3), normal(3, 3, 3), normal(2, 5, 7, 3)
    found = jax.jit(lambda *a: jax.vjp(depthwise_conv, *a[:2])[1](a[2]))(x, kernel, dy)

    def gradient(of):
        """By unit vectors."""
        ones = np.eye(of.size).reshape(-1, *of.shape)
        return np.array([np.vdot(dy, value(one)) for one in ones]).reshape(of.shape)

    def value(one):
        pair = (one, kernel) if one.shape == x.shape else (x, one)
        return convolve(*(t.astype(np.float64) for t in pair))

    for a, b in zip(found, map(gradient, (x, kernel)), strict=True):
        toy.assert_close(a, b, 1e-6)


def test_glumbconv():
    x, kernel = normal(2, 5, 4, 12), normal(3, 3, 12)
    bias, depthwise_bias = normal(12), normal(12)
    u = convolve(silu(x.astype(np.float64) + bias), kernel.astype(np.float64)) + depthwise_bias
    toy.assert_close(
        jax.jit(glumbconv)(x, bias, kernel, depthwise_bias), u[..., :6] * silu(u[..., 6:]), 1e-6
    )


def test_they_can_be_differentiated():
    q, k, v = (normal(1, 6, 2, 4) for _ in range(3))
    x, kernel, bias = normal(1, 3, 4, 8), normal(3, 3, 8), normal(8)
    attention = jax.grad(lambda *a: jnp.sum(linear_attention(*a) ** 2), argnums=(0, 1, 2))
    gate = jax.grad(lambda *a: jnp.sum(glumbconv(*a) ** 2), argnums=(0, 1, 2, 3))
    for gradient in (*attention(q, k, v), *gate(x, bias, kernel, bias)):
        assert np.isfinite(gradient).all() and np.any(gradient)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_sum_in_float32(dtype):
    """4096 keys of one sign: narrow sums would stop growing at 256 (bfloat16) or 2048."""
    q = jnp.ones((1, 1, 1, 4), dtype)
    k, v = jnp.ones((1, 4096, 1, 4), dtype), jnp.ones((1, 4096, 1, 4), dtype)
    out = linear_attention(jnp.broadcast_to(q, k.shape), k, v * jnp.asarray(0.5, dtype))
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), 0.5, rtol=1e-2)
