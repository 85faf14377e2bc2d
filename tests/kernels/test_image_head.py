"""The kernel of the decoder's end against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.image_head import reference, tpu, uses_kernel
from tests.kernels.helpers import TOLERANCE, normal, relative_error


def head(x, scale, shift, kernel, bias):
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + shift
    y = np.pad(np.maximum(y, 0), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = y.shape[1] - 2, y.shape[2] - 2
    return bias + sum(
        y[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3)
    )


@pytest.mark.parametrize("shape, rows", [((2, 32, 128, 128), 16), ((1, 6, 128, 256), 2)])
def test_kernel_on_tpu(on_tpu, shape, rows):
    """Inner blocks of rows and those at the edges."""
    channels = shape[-1]
    assert tpu.rows_at_once(*shape[1:], 3) == rows
    kernel = normal(3, 3, channels, 3) / (3 * channels**0.5)
    inputs = normal(*shape), 1 + 0.2 * normal(channels), normal(channels), kernel, normal(3)
    inputs = [jnp.asarray(array, jnp.bfloat16) for array in inputs]
    expected = head(*(np.asarray(array, np.float64) for array in inputs))
    found = jax.jit(tpu.forward)(*inputs)
    assert found.dtype == jnp.float32
    assert relative_error(found, expected) < TOLERANCE["bfloat16"] / 2
    assert relative_error(reference.image_head(*inputs), expected) < TOLERANCE["bfloat16"]


def test_images_without_a_kernel():
    shapes = (8, 64, 128, 3), (8, 128, 96, 3), (8, 128, 128, 12), (8, 2**18, 128, 3)
    assert not any(tpu.rows_at_once(*shape) for shape in shapes)
    assert tpu.rows_at_once(1024, 1024, 128, 3) == 16
    assert not uses_kernel((1, 8, 128, 128), 3, "float32", "pallas")
