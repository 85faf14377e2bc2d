"""The kernel of the decoder's change of resolution against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.upsample import reference, tpu, uses_kernel
from tests.kernels.helpers import TOLERANCE, normal, relative_error


def doubled(x, kernel, bias):
    """Nearest neighbour, then the 3x3 convolution, then the shortcut."""
    large = np.pad(x.repeat(2, 1).repeat(2, 2), ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = large.shape[1] - 2, large.shape[2] - 2
    y = sum(large[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))
    batch, features = len(x), kernel.shape[-1]
    copies = x.repeat(4 * features // x.shape[-1], -1)
    copies = copies.reshape(batch, height // 2, width // 2, features, 2, 2)
    return y + bias + copies.transpose(0, 1, 4, 2, 5, 3).reshape(y.shape)


def arrays(batch, height, width, channels, features):
    image, bias = normal(batch, height, width, channels), normal(features)
    kernel = normal(3, 3, channels, features) / (3 * channels**0.5)
    return tuple(jnp.asarray(array, jnp.bfloat16) for array in (image, kernel, bias))


@pytest.mark.parametrize(
    "shape, rows",
    [
        ((2, 16, 16, 256, 128), 8),  # a pair of columns has the same shortcut
        ((1, 6, 16, 128, 128), 2),  # as has a pair of rows
        ((1, 3, 32, 512, 128), 1),  # none has
    ],
)
def test_kernel_on_tpu(on_tpu, shape, rows):
    """Inner blocks of rows and those at the edges."""
    assert tpu.rows_at_once(*shape[1:]) == rows
    inputs = arrays(*shape)
    expected = doubled(*(np.asarray(array, np.float64) for array in inputs))
    found = jax.jit(tpu.forward)(*inputs)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, expected) < TOLERANCE["bfloat16"] / 2  # one rounding
    assert relative_error(reference.upsample(*inputs), expected) < TOLERANCE["bfloat16"]


def test_images_without_a_kernel():
    shapes = (8, 24, 128, 128), (8, 16, 96, 128), (8, 16, 128, 96), (8, 2**16, 128, 128)
    assert not any(tpu.rows_at_once(*shape) for shape in shapes)
    assert tpu.rows_at_once(512, 512, 256, 128) == 8
    assert not uses_kernel((1, 8, 16, 128), 128, "float32", "pallas")
