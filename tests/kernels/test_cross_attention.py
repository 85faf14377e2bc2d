"""Cross-attention's kernel against its formula in float64, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax.kernels.cross_attention import api, tpu
from tests.kernels.helpers import check, normal, rng


@pytest.mark.parametrize("dtype", ["bfloat16"])  # what the kernel is offered for
@pytest.mark.parametrize("tokens, rows, channels, heads", [(32, 20, 144, 2), (21, 37, 112, 1)])
def test_kernel_on_tpu(on_tpu, monkeypatch, tokens, rows, channels, heads, dtype):
    for name in ("TOKENS", "BACKWARD_TOKENS"):
        monkeypatch.setattr(tpu, name, 16)
    mask = rng.random((2, rows)) < 0.6
    mask[0] = False  # nothing to see: a softmax over all rows

    def formula(q, kv):
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, *jnp.split(kv, 2, axis=-1)))
        logits = jnp.einsum("bnhd,blhd->bhnl", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits + jnp.where(mask, 0, -1e4)[:, None, None], axis=-1)
        return jnp.einsum("bhnl,blhd->bnhd", weights, v).reshape(*q.shape[:2], -1)

    def run(arrays, cotangent):
        bias = api._bias(jnp.asarray(mask))
        out = tpu.forward(*arrays, bias, heads)
        return out, tpu.backward(*arrays, bias, cotangent, heads)

    check(run, formula, [normal(2, tokens, channels), normal(2, rows, 2 * channels)], dtype)
