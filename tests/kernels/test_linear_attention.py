"""Linear attention against its formula in float64: the plain form, and the kernels both ways."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.linear_attention import gpu, linear_attention, reference, tpu
from tests import toy
from tests.kernels.helpers import TOLERANCE, check, normal, run_public

EPSILON = 1e-15
single = partial(normal, dtype=np.float32)


@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 4), (35, 3, 8), (64, 2, 32)])
def test_plain_form(tokens, heads, width):
    q, k, v = (single(2, tokens, heads, width) for _ in range(3))
    weights = np.einsum("bnhd,bmhd->bhnm", *(np.maximum(t, 0).astype(np.float64) for t in (q, k)))
    expected = np.einsum("bhnm,bmhe->bnhe", weights, v)
    expected /= np.moveaxis(weights.sum(-1), 1, 2)[..., None] + 1e-15
    toy.assert_close(reference.linear_attention(q, k, v), expected, 1e-6)


def test_dead_queries_give_zero():
    q, k, v = (single(1, 5, 2, 4) for _ in range(3))
    q[0, 3] = -1
    out = reference.linear_attention(q, k, v)
    assert (out[0, 3] == 0).all() and np.isfinite(out).all()


def test_plain_form_can_be_differentiated():
    q, k, v = (single(1, 6, 2, 4) for _ in range(3))
    attention = jax.grad(lambda *a: jnp.sum(reference.linear_attention(*a) ** 2), argnums=(0, 1, 2))
    for gradient in jax.jit(attention)(q, k, v):
        assert np.isfinite(gradient).all() and np.any(gradient)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_sum_in_float32(dtype):
    """4096 keys of one sign: narrow sums would stop growing at 256 (bfloat16) or 2048."""
    q = jnp.ones((1, 1, 1, 4), dtype)
    k, v = jnp.ones((1, 4096, 1, 4), dtype), jnp.ones((1, 4096, 1, 4), dtype)
    out = reference.linear_attention(jnp.broadcast_to(q, k.shape), k, v * jnp.asarray(0.5, dtype))
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float32), 0.5, rtol=1e-2)


def softmax_free_attention(qkv, head_dim):
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in jnp.split(qkv, 3, axis=-1))
    weights = jnp.einsum("bnhd,bmhd->bhnm", jnp.maximum(q, 0), jnp.maximum(k, 0))
    total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None] + EPSILON
    return (jnp.einsum("bhnm,bmhd->bnhd", weights, v) / total).reshape(*qkv.shape[:2], -1)


def run_linear(module, head_dim, arrays, cotangent):
    (qkv,) = arrays
    state = module.state(qkv, head_dim)
    out = module.apply(qkv, state, head_dim, EPSILON)
    d_state = module.state_cotangent(qkv, state, cotangent, head_dim, EPSILON)
    return out, [module.cotangents(qkv, state, d_state, cotangent, head_dim, EPSILON)]


# Heads that do not fill the last group, tokens that do not fill the last block.
LINEAR = [(2, 24, 96, 32, 512), (1, 40, 224, 32, 32), (1, 19, 192, 16, 16)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch, tokens, channels, head_dim, block", LINEAR)
def test_kernel_on_tpu(on_tpu, monkeypatch, batch, tokens, channels, head_dim, block, dtype):
    monkeypatch.setattr(tpu, "TOKENS", block)
    formula = partial(softmax_free_attention, head_dim=head_dim)
    run = partial(run_linear, tpu, head_dim)
    check(run, formula, [normal(batch, tokens, 3 * channels)], dtype)


@pytest.mark.parametrize("tokens, channels, programs", [(70, 96, 1), (160, 32, 4)])
def test_kernel_on_gpu(on_gpu, monkeypatch, tokens, channels, programs):
    """With all tokens in one part, or in two, of which one is longer."""
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    formula = partial(softmax_free_attention, head_dim=32)
    run = partial(run_linear, gpu, 32)
    check(run, formula, [normal(2, tokens, 3 * channels)], "float32")


def test_kernels_of_split_tokens(split_tokens):
    attention = partial(linear_attention, head_dim=32, implementation="pallas")
    formula = partial(softmax_free_attention, head_dim=32)
    check(partial(run_public, attention), formula, [normal(2, 24, 3 * 96)], "float32")
