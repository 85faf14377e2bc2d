"""A residual block for TPU (Pallas Mosaic), forward.

A grid step computes some rows of an image. It reads two more rows on either side, and computes the
first convolution on one more row; rows outside the image are zero for either convolution.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.mosaic import LANES, half_silu, vmem_bytes
from sana_jax.kernels.res_block.reference import EPSILON

HALO = 2  # rows on either side, one for each convolution
ROWS = TPU["res_block"]


def rows_at_once(height: int, width: int, channels: int) -> int:
    """Returns the rows of a grid step, an even number; 0 if the image has no kernel."""
    if channels % LANES or width % 16:
        return 0
    weights = 4 * 9 * channels**2 * 2  # bfloat16, two buffers of each
    for rows in ROWS:
        sums = 3 * channels * width * (rows + 2) * (4 + 2)  # in float32, and their operands
        images = 4 * channels * width * (rows + 2 * HALO) * (2 + 4)
        if height % rows == 0 and weights + sums + images < vmem_bytes():
            return rows
    return 0


def forward(
    x: Float[Array, "B H W C"],
    kernel1: Float[Array, "3 3 C C"],
    bias1: Float[Array, " C"],
    kernel2: Float[Array, "3 3 C C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
) -> Float[Array, "B H W C"]:
    """Computes reference.res_block; sums, activation and norm are float32."""
    batch, height, width, channels = x.shape
    rows = rows_at_once(height, width, channels)
    steps = rows // HALO

    def image(size, index):
        return pl.BlockSpec((1, size, width, channels), lambda b, i: (b, index(i), 0, 0))

    def whole(*shape):
        return pl.BlockSpec(shape, lambda b, i: (0,) * len(shape))

    # At the edges of the image the halo is any row of it, which the kernel replaces by zeros.
    above = image(HALO, lambda i: jnp.maximum(i * steps - 1, 0))
    below = image(HALO, lambda i: jnp.minimum((i + 1) * steps, height // HALO - 1))
    matrix, vector = whole(*kernel1.shape), whole(1, channels)
    here = image(rows, lambda i: i)
    return pl.pallas_call(
        partial(_kernel, height),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(batch, height // rows),
        in_specs=[above, here, below, matrix, vector, matrix, vector, vector],
        out_specs=here,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 2 * 9 * channels * x.size,
            bytes_accessed=(2 * rows + 2 * HALO) * x.size // rows * x.dtype.itemsize,
            transcendentals=x.size,
        ),
        name="res_block",
    )(
        *(x, x, x),
        *(kernel1, _as_row(bias1), kernel2),
        *(_as_row(scale), _as_row(bias)),
    )


def _as_row(vector):
    return vector.astype(jnp.float32)[None]


def _kernel(height, above, x, below, kernel1, bias1, kernel2, scale, bias, out):
    rows = x.shape[1]
    first = pl.program_id(1) * rows  # row of this step
    read = jnp.concatenate([above[0], x[0], below[0]])  # (rows + 4, W, C)
    h = _convolve(_zero_outside(read, first - 2, height), kernel1) + bias1[...]
    h = _zero_outside(half_silu(0.5 * h), first - 1, height)
    y = _convolve(h.astype(x.dtype), kernel2)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
    y = y * scale[...] + bias[...]
    out[0] = (x[0].astype(jnp.float32) + y).astype(x.dtype)


def _zero_outside(image, first, height):
    """Zeroes the rows of `image`, which starts at row `first`, outside 0 .. height - 1."""
    row = first + jax.lax.broadcasted_iota(jnp.int32, image.shape, 0)
    return jnp.where((row >= 0) & (row < height), image, jnp.zeros_like(image))


def _convolve(image, kernel):
    """Maps (n + 2, W, C) to (n, W, D) in float32, with a column of zeros on either side."""
    size, width = image.shape[0] - 2, image.shape[1]
    around = jnp.concatenate([image[:-2], image[1:-1], image[2:]], axis=-1)
    around = around.reshape(size * width, -1)  # (n W, 3 C)
    precision = "highest" if image.dtype == jnp.float32 else "default"  # float32 is for tests

    def product(column):
        taps = kernel[:, column].reshape(around.shape[1], -1)  # rows of taps stacked, (3 C, D)
        sums = jnp.dot(around, taps, preferred_element_type=jnp.float32, precision=precision)
        return sums.reshape(size, width, -1)

    # The sums of the left taps belong one pixel to the right, those of the right taps to the left.
    left, middle, right = map(product, range(3))
    column = jax.lax.broadcasted_iota(jnp.int32, middle.shape, 1)
    left = jnp.where(column == 0, 0.0, pltpu.roll(left, 1, 1))
    right = jnp.where(column == width - 1, 0.0, pltpu.roll(right, width - 1, 1))
    return middle + left + right
