"""The residual block's kernel against its formula in float64, and in the autoencoder's module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sana_jax.kernels.dispatch import plain_gradient
from sana_jax.kernels.res_block import reference, tpu, uses_kernel
from sana_jax.models.dc_ae import ResBlock
from sana_jax.sharding import make_mesh
from tests.kernels.helpers import TOLERANCE, check, normal, relative_error


def residual_block(x, kernel1, bias1, kernel2, scale, bias):
    def convolve(x, kernel):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1] - 2, x.shape[2] - 2
        return sum(x[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))

    y = convolve(jax.nn.silu(convolve(x, kernel1) + bias1), kernel2)
    return x + y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def residual_arrays(batch, height, width, channels):
    kernel = 3, 3, channels, channels
    vectors = [normal(channels) for _ in range(3)]
    return (
        normal(batch, height, width, channels),
        *(normal(*kernel) / 40, vectors[0], normal(*kernel) / 40),
        *vectors[1:],
    )


@pytest.mark.parametrize("shape, rows", [((2, 24, 16, 128), 8), ((1, 12, 32, 128), 4)])
def test_kernel_on_tpu(on_tpu, shape, rows):
    """Inner blocks of rows and those at the edges; the gradient is the plain form's."""
    assert tpu.rows_at_once(*shape[1:]) == rows

    def run(arrays, cotangent):
        out, pull_back = jax.vjp(plain_gradient(reference.res_block)(tpu.forward), *arrays)
        return out, pull_back(cotangent)

    check(run, residual_block, residual_arrays(*shape), "float32")
    arrays = [jnp.asarray(array, "bfloat16") for array in residual_arrays(*shape)]
    with jax.enable_x64(True):
        expected = residual_block(*(np.asarray(array, np.float64) for array in arrays))
    found = jax.jit(tpu.forward)(*arrays)
    assert relative_error(found, expected) < TOLERANCE["bfloat16"]


def test_images_without_a_kernel():
    shapes = (9, 16, 128), (8, 24, 128), (8, 16, 96), (8, 2**16, 128)
    assert not any(tpu.rows_at_once(*shape) for shape in shapes)
    assert tpu.rows_at_once(1024, 1024, 128) == 8
    assert not uses_kernel((1, 8, 16, 128), "float32", "pallas")


@pytest.mark.parametrize("batch", [1, 8])
def test_the_module_s_residual_block_is_the_kernel_s(batch):
    """With and without it, from the same weights, on one device and on a mesh."""
    x = jnp.asarray(normal(batch, 8, 16, 128), jnp.bfloat16)
    plain, fused = (ResBlock(dtype="bfloat16", implementation=name) for name in ("xla", "pallas"))
    assert fused.uses_kernel(x) and not plain.uses_kernel(x)
    shapes = nn.unbox(jax.eval_shape(fused.init, jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape) / 10), shapes)
    expected = plain.apply(params, x)[0].astype(jnp.float32)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        found = jax.jit(fused.apply)(params, x)[0].astype(jnp.float32)
    assert relative_error(found, expected) < TOLERANCE["bfloat16"]
