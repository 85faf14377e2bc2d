"""Pallas' interpreters in place of a TPU or a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sana_jax.kernels import scaled_product
from sana_jax.kernels.glumbconv import api as glumbconv
from sana_jax.kernels.glumbconv import gpu
from sana_jax.kernels.linear_attention import api as linear_attention
from sana_jax.sharding import make_mesh
from tests import toy
from tests.kernels.helpers import kernel_of, rng


@pytest.fixture(autouse=True)
def numbers():
    """Gives every test the same random numbers, whichever tests ran before it."""
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture
def on_tpu():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    """The interpreter, with formulas in place of PTX, and the largest error that it may have."""

    def fast_tanh(x):
        return jnp.tanh(x) * (1 + jnp.where(x > 0.3, 1, -1) * 2**-10.987)

    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(gpu, "multiply_add", lambda x, y, z: x * y + z)
    monkeypatch.setattr(gpu, "fast_tanh", fast_tanh)
    monkeypatch.setattr(gpu, "COLUMNS", 2)


@pytest.fixture(params=["tpu", "cuda"])
def split_tokens(request, monkeypatch):
    """Two images over fsdp=2, their tokens over sequence=2, with the kernels of a platform."""
    request.getfixturevalue({"tpu": "on_tpu", "cuda": "on_gpu"}[request.param])
    for api in (linear_attention, glumbconv, scaled_product):
        monkeypatch.setattr(api, "by_platform", kernel_of(request.param))
    with jax.set_mesh(make_mesh(replica=1, fsdp=2, sequence=2, devices=toy.devices(4))):
        yield
