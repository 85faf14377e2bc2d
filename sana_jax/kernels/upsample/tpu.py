"""The decoder's change of resolution for TPU (Pallas Mosaic), forward.

A grid step reads some rows of the small picture, and one more on either side. An even row of the
result is two rows of x, the one above and its own, times two sums of the kernel's rows, an odd row
its own and the one below; the same holds for columns (see convolve_doubled). So each kind of row is
one product, of two rows of x with four kinds of taps side by side:

    left taps of even columns | own taps of even | own taps of odd | right taps of odd columns

of which the outer two are shifted by a pixel. The shortcut, which copies channels, is a product
with zeros and ones: it is exact, and a matrix unit copies lanes better than a vector unit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.mosaic import LANES, vmem_bytes

ROWS = TPU["upsample"]


def rows_at_once(height: int, width: int, channels: int, features: int) -> int:
    """Returns the rows of x in a grid step; 0 if the image has no kernel."""
    if channels % LANES or features % LANES or width % 16 or 4 * features % channels:
        return 0
    weights = 2 * 2 * (2 * 2 * channels * 4 * features + 2 * channels * 2 * features)
    for rows in ROWS:
        sums = rows * width * (4 * features * 4 + 4 * features * 4 + 2 * 2 * channels * 2)
        images = 2 * rows * width * 2 * (2 * channels + 4 * features)
        if height % rows == 0 and weights + sums + images < vmem_bytes():
            return rows
    return 0


def forward(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], bias: Float[Array, " D"]
) -> Float[Array, "B 2*H 2*W D"]:
    """Computes reference.upsample of bfloat16; sums are float32."""
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    rows = rows_at_once(height, width, channels, features)
    taps, copies = _taps(kernel).astype(x.dtype), _copies(channels, features)

    def image(size, index):
        return pl.BlockSpec((1, size, width, channels), lambda b, i: (b, index(i), 0, 0))

    def whole(array):
        return pl.BlockSpec(array.shape, lambda b, i: (0,) * array.ndim)

    # At the edges of the image the halo is any row of it, which the kernel replaces by zeros.
    above = image(1, lambda i: jnp.maximum(i * rows - 1, 0))
    below = image(1, lambda i: jnp.minimum((i + 1) * rows, height - 1))
    bias = bias.astype(jnp.float32)[None]
    copies = jnp.asarray(copies, x.dtype)
    # The rows of the result are those of x, of two kinds each.
    result = batch, height, 2, 2 * width, features
    out = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(result, x.dtype),
        grid=(batch, height // rows),
        in_specs=[above, image(rows, lambda i: i), below, whole(taps), whole(copies), whole(bias)],
        out_specs=pl.BlockSpec((1, rows, *result[2:]), lambda b, i: (b, i, 0, 0, 0)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * (16 * features + copies.size // channels),
            bytes_accessed=(x.size * (rows + 2) // rows + 4 * x.size // channels * features) * 2
            + 2 * (taps.size + copies.size),
            transcendentals=0,
        ),
        name="upsample",
    )(x, x, x, taps, copies, bias)
    return out.reshape(batch, 2 * height, 2 * width, features)


def _taps(kernel):
    """Returns the products of an even row and of an odd one, (2, 2 C, 4 D), in float32."""
    k0, k1, k2 = kernel.astype(jnp.float32)  # rows, (3, C, D) each

    def columns(row):
        c0, c1, c2 = row
        return jnp.concatenate([c0, c1 + c2, c0 + c1, c2], axis=-1)

    pairs = ((k0, k1 + k2), (k0 + k1, k2))
    return jnp.stack([jnp.concatenate([columns(row) for row in pair]) for pair in pairs])


def _copies(channels: int, features: int) -> np.ndarray:
    """Returns the shortcut of each kind of row, (2, C, n D): n kinds of columns that differ."""
    row, column = np.arange(2)[:, None, None], np.arange(2)[:, None]
    repeats = 4 * features // channels
    source = (4 * np.arange(features) + 2 * row + column) // repeats  # (2, 2, D)
    if repeats % 2 == 0:
        source = source[:, :1]
    chosen = source[:, None] == np.arange(channels)[:, None, None]  # (2, C, n, D)
    return chosen.reshape(2, channels, -1)


def _kernel(above, x, below, taps, copies, bias, out):
    _, rows, width, channels = x.shape
    i, last = pl.program_id(1), pl.num_programs(1) - 1
    zero = jnp.zeros_like(above[0])
    read = jnp.concatenate(
        [jnp.where(i == 0, zero, above[0]), x[0], jnp.where(i == last, zero, below[0])]
    )
    here = x[0].reshape(rows * width, channels)
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    for row in range(2):  # even and odd
        pair = jnp.concatenate([read[row : row + rows], read[row + 1 : row + 1 + rows]], axis=-1)
        sums = dot(pair.reshape(rows * width, 2 * channels), taps[row])
        left, even, odd, right = jnp.split(sums.reshape(rows, width, -1), 4, axis=-1)
        column = jax.lax.broadcasted_iota(jnp.int32, left.shape, 1)
        left = jnp.where(column == 0, 0.0, pltpu.roll(left, 1, 1))
        right = jnp.where(column == width - 1, 0.0, pltpu.roll(right, width - 1, 1))
        copied = dot(here, copies[row]).reshape(rows, width, -1)
        features = left.shape[-1]
        even = even + left + copied[..., :features] + bias[...]
        odd = odd + right + copied[..., -features:] + bias[...]
        words = jnp.uint32(0xFFFF0000) & _bits(odd) | _bits(even) >> 16
        both = pltpu.bitcast(words.reshape(rows * width, features), out.dtype)
        out[0, :, row] = both.reshape(rows, 2 * width, features)


def _bits(x):
    """Returns float32 numbers, rounded to bfloat16, as words.

    A register of bfloat16 has two rows in each word, so two columns of the result make a word.
    """
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
