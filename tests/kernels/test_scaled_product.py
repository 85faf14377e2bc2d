"""A product times a factor, and its gradients."""

from functools import partial

import jax
import pytest

from sana_jax.kernels import scaled_product
from sana_jax.sharding import make_mesh
from tests import toy
from tests.kernels.helpers import TOLERANCE, check, kernel_of, normal, run_public


def formula(x, kernel, scale):
    return scale * (x @ kernel)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("platform", ["tpu", "other"])
@pytest.mark.parametrize("shape", [(3, 20, 200), (2, 16, 256)])
def test_scaled_product(on_tpu, monkeypatch, platform, shape, dtype):
    """In blocks of inputs, of which the last may be cut off."""
    monkeypatch.setattr(scaled_product, "by_platform", kernel_of(platform))
    monkeypatch.setattr(scaled_product, "INPUTS", 128)
    arrays = normal(*shape), normal(shape[2], 72), normal(shape[0], 1, 72)
    check(partial(run_public, scaled_product.scaled_product), formula, arrays, dtype)


def test_over_a_mesh(on_tpu, monkeypatch):
    """Two images on each of two devices, their tokens on two more."""
    monkeypatch.setattr(scaled_product, "by_platform", kernel_of("tpu"))
    arrays = normal(4, 8, 40), normal(40, 24), normal(4, 1, 24)
    with jax.set_mesh(make_mesh(replica=1, fsdp=2, sequence=2, devices=toy.devices(4))):
        check(partial(run_public, scaled_product.scaled_product), formula, arrays, "float32")


def test_what_has_a_kernel():
    sizes = 1024, 5600, 2240, 2
    assert scaled_product.supported(4, *sizes)
    assert not scaled_product.supported(4, 16384, 5600, 2240, 2)  # VMEM holds no image of 4096 px
    for axes, batch in ((dict(tensor=2), 4), (dict(replica=2), 2)):
        with jax.set_mesh(make_mesh(fsdp=2, devices=toy.devices(4), **axes)):
            assert not scaled_product.supported(batch, *sizes)
