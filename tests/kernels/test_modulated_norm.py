"""The modulated norm's kernel against its formula in float64, forward and backward."""

import jax.numpy as jnp
import pytest

from sana_jax.kernels.modulated_norm import tpu
from tests.kernels.helpers import TOLERANCE, check, normal


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, channels", [(32, 128), (21, 72)])
def test_kernel_on_tpu(on_tpu, monkeypatch, tokens, channels, dtype):
    monkeypatch.setattr(tpu, "TOKENS", 16)

    def formula(x, shift, scale):
        y = x - x.mean(-1, keepdims=True)
        y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)
        return y * (1 + scale) + shift + x  # the residual's use of x, with the same cotangent

    def run(arrays, cotangent):
        x, shift, scale = arrays
        shift, scale = shift.astype(jnp.float32), scale.astype(jnp.float32)
        out = tpu.forward(x, shift, scale).astype(jnp.float32) + x
        return out, tpu.backward(x, cotangent, cotangent, scale)

    vector = 2, 1, channels
    check(run, formula, [normal(2, tokens, channels), normal(*vector), normal(*vector)], dtype)
