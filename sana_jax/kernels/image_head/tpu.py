"""The end of the autoencoder's decoder for TPU (Pallas Mosaic), forward.

An image has three channels, and a register 128 lanes. So the pixels of a row are in the lanes here:
a row of the result is kernel x row^T, with the nine taps of three channels one below the other, and
a pixel to the left or right is a lane.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.mosaic import LANES, vmem_bytes
from sana_jax.kernels.res_block.reference import EPSILON

ROWS = TPU["image_head"]
SUBLANES = 8  # of a register: one tap of all channels of an image


def rows_at_once(height: int, width: int, channels: int, features: int) -> int:
    """Returns the rows of a grid step; 0 if the image has no kernel."""
    if channels % LANES or width % LANES or features > SUBLANES:
        return 0
    for rows in ROWS:
        images = (rows + 2) * width * channels * (2 * 2 + 3 * 4)
        results = rows * width * SUBLANES * 4 * 2 + (rows + 2) * width * 9 * SUBLANES * 4
        if height % rows == 0 and images + results < vmem_bytes():
            return rows
    return 0


def forward(
    x: Float[Array, "B H W C"],
    scale: Float[Array, " C"],
    shift: Float[Array, " C"],
    kernel: Float[Array, "3 3 C D"],
    bias: Float[Array, " D"],
) -> Float[Array, "B H W D"]:
    """Computes reference.image_head of bfloat16, all but the products in float32."""
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    rows = rows_at_once(height, width, channels, features)
    # Rows are those of the kernel, its columns within them, channels of the image within these.
    empty = SUBLANES - features
    taps = jnp.pad(kernel.transpose(0, 1, 3, 2), ((0, 0), (0, 0), (0, empty), (0, 0)))
    taps = taps.reshape(9 * SUBLANES, channels).astype(x.dtype)
    column = jnp.pad(bias.astype(jnp.float32), (0, empty))[:, None]

    def image(size, index):
        return pl.BlockSpec((1, size, width, channels), lambda b, i: (b, index(i), 0, 0))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda b, i: (0, 0))

    # At the edges of the image the halo is any row of it, which the kernel replaces by zeros.
    above = image(1, lambda i: jnp.maximum(i * rows - 1, 0))
    below = image(1, lambda i: jnp.minimum((i + 1) * rows, height - 1))
    vectors = [vector.astype(jnp.float32)[None] for vector in (scale, shift)]
    out = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((batch, height, SUBLANES, width), jnp.float32),
        grid=(batch, height // rows),
        in_specs=[above, image(rows, lambda i: i), below]
        + [whole(array) for array in (*vectors, taps, column)],
        out_specs=pl.BlockSpec((1, rows, SUBLANES, width), lambda b, i: (b, i, 0, 0)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * taps.shape[0] * x.size,
            bytes_accessed=x.size * (rows + 2) // rows * 2 + 4 * x.size // channels * SUBLANES,
            transcendentals=x.size // channels,
        ),
        name="image_head",
    )(x, x, x, *vectors, taps, column)
    return out[:, :, :features].transpose(0, 1, 3, 2)


def _kernel(above, x, below, scale, shift, taps, bias, out):
    rows, width = x.shape[1:3]
    i, last = pl.program_id(1), pl.num_programs(1) - 1
    pixel = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 1)

    def product(row):
        """Returns the nine taps of a row of the image, (9 SUBLANES, W)."""
        row = row.astype(jnp.float32)
        row = row * jax.lax.rsqrt(jnp.mean(row * row, axis=-1, keepdims=True) + EPSILON)
        row = jnp.maximum(row * scale[...] + shift[...], 0).astype(x.dtype)
        across = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(taps[...], row, across, preferred_element_type=jnp.float32)

    edge = jnp.zeros((taps.shape[0], width), jnp.float32)
    products = [
        jnp.where(i == 0, edge, product(above[0, 0])),
        *(product(x[0, row]) for row in range(rows)),
        jnp.where(i == last, edge, product(below[0, 0])),
    ]
    for row in range(rows):
        three = [jnp.split(products[row + k], 3)[k] for k in range(3)]
        left, middle, right = jnp.split(three[0] + three[1] + three[2], 3)
        left = jnp.where(pixel == 0, 0.0, pltpu.roll(left, 1, 1))
        right = jnp.where(pixel == width - 1, 0.0, pltpu.roll(right, width - 1, 1))
        out[0, row] = left + middle + right + bias[...]
