"""Adding a bias, and its gradient."""

from functools import partial

import jax.numpy as jnp
import pytest

from sana_jax.kernels import bias
from tests.kernels.helpers import check, kernel_of, normal, run_public


@pytest.mark.parametrize("platform", ["tpu", "other"])
@pytest.mark.parametrize("shape", [(2, 40, 24), (3, 24), (24,)])
def test_add_bias(monkeypatch, platform, shape):
    monkeypatch.setattr(bias, "by_platform", kernel_of(platform))
    arrays = [normal(*shape), normal(24)]
    check(partial(run_public, bias.add_bias), jnp.add, arrays, "bfloat16")
