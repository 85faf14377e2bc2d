"""Multi-scale attention for TPU (Pallas Mosaic), forward.

A grid step takes one image and as many heads as fill 128 lanes, with their q, k and v, and does all
that they need in VMEM. A product with zeros and ones sorts their 384 channels first, from [q | k |
v] of every head to all q, all k and all v: it is exact, and the heads then lie as
linear_attention/tpu.py has them, with its masks and the denominator as a product. The sorted image
is kept in float32 with a border of zeros, at whose offsets the depthwise convolution reads it.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.linear_attention.reference import EPSILON
from sana_jax.kernels.mosaic import LANES, MIB, vmem_bytes
from sana_jax.kernels.multiscale_attention.reference import Scale

BORDER = 8  # columns, a sublane tile
TOKENS, PIXELS = TPU["multiscale_attention"], TPU["multiscale_convolve"]


def supported(
    height: int, width: int, channels: int, head_dim: int, sizes: tuple[int, ...]
) -> bool:
    """Returns True if the heads fill groups of lanes, and a group of an image fits into VMEM."""
    if channels % (3 * LANES) or LANES % head_dim or width % 16 or max(sizes, default=1) > BORDER:
        return False
    pixels = height * width * LANES * 2  # bytes of a group of heads in bfloat16
    padded = 3 * (height + 2 * _radius(sizes)) * (width + 2 * BORDER) * LANES * 4
    return (2 * 3 + 3 + 1 + len(sizes)) * pixels + padded + 8 * MIB < vmem_bytes()


def _radius(sizes):
    return max((3, *sizes)) // 2


def forward(
    qkv: Float[Array, "B H W C3"], scales: tuple[Scale, ...], head_dim: int
) -> Float[Array, "B H W C"]:
    """Computes reference.multiscale_attention of bfloat16; sums are float32."""
    batch, height, width, channels = qkv.shape
    groups, heads = channels // (3 * LANES), LANES // head_dim
    weights = [_sort(*scale, heads) for scale in scales]
    weights = [(taps.astype(jnp.float32), mixing.astype(qkv.dtype)) for taps, mixing in weights]

    specs = [
        (
            pl.BlockSpec((len(taps), 3 * LANES), lambda b, g: (0, g)),
            pl.BlockSpec((3, LANES, LANES), lambda b, g: (g, 0, 0)),
        )
        for taps, _ in weights
    ]
    order = jnp.asarray(_order(heads), qkv.dtype)
    results = 1 + len(scales)
    radius = _radius(len(depthwise) for depthwise, _ in scales)
    return pl.pallas_call(
        partial(_kernel, head_dim),
        out_shape=jax.ShapeDtypeStruct((batch, height, width, results * groups * LANES), qkv.dtype),
        grid=(batch, groups),
        in_specs=[
            pl.BlockSpec((1, height, width, 3 * LANES), lambda b, g: (b, 0, 0, g)),
            pl.BlockSpec(order.shape, lambda b, g: (0, 0)),
            specs,
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.VMEM((3, height + 2 * radius, width + 2 * BORDER, LANES), jnp.float32),
            pltpu.VMEM((3, height, width, LANES), qkv.dtype),
            pltpu.VMEM((2, LANES, LANES), jnp.float32),
            pltpu.VMEM((results, height, width, LANES), qkv.dtype),
            pltpu.SemaphoreType.DMA((results,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * qkv.size // 3 * LANES * (9 + 4 * results + 3 * len(scales)),
            bytes_accessed=qkv.size // 3 * (3 + results) * 2,
            transcendentals=0,
        ),
        name="multiscale_attention",
    )(qkv, order, weights)


def _order(heads: int) -> np.ndarray:
    """Returns the matrix that sorts the channels of a group."""
    channels = np.arange(3 * LANES).reshape(heads, 3, -1).transpose(1, 0, 2).ravel()
    return np.arange(3 * LANES)[:, None] == channels


def _sort(depthwise, pointwise, heads):
    """Returns the taps in sorted order (K K, C3), and 1x1 as blocks of matrices (G, 128, 128)."""
    taps = rearrange(depthwise, "k l (g n s d) -> (k l) (g s n d)", n=heads, s=3, d=LANES // heads)
    rows = rearrange(pointwise, "(g n s) d e -> (g s) (n d) e", n=heads, s=3)
    wide = jnp.tile(rows, (1, 1, heads))  # (3 G, 128, 128)
    head = np.arange(LANES) // (LANES // heads)
    return taps, jnp.where(head[:, None] == head, wide, 0)


def _dot(x, y, contract=(1, 0)):
    return jax.lax.dot_general(
        x,
        y,
        ((contract[:1], contract[1:]), ((), ())),
        precision=jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _kernel(head_dim, x, order, scales, out, padded, qkv, state, results, copied):
    _, height, width, _ = x.shape
    rows = math.gcd(height, max(1, TOKENS // width))
    radius = (padded.shape[1] - height) // 2
    _clear_border(padded, radius, height, width)

    def sort(i):
        here = pl.ds(i * rows, rows)
        parts = jnp.split(_dot(x[0, here].reshape(rows * width, 3 * LANES), order[...]), 3, axis=1)
        for part, values in enumerate(parts):
            values = values.reshape(rows, width, LANES)
            padded[part, pl.ds(radius + i * rows, rows), BORDER : BORDER + width] = values
            qkv[part, here] = values.astype(x.dtype)

    def write(scale):
        """Attends, and starts to copy the result behind those of the scales before it."""
        _attend(head_dim, qkv, state, results.at[scale])
        first = (scale * pl.num_programs(1) + pl.program_id(1)) * LANES
        to = out.at[pl.program_id(0), :, :, pl.ds(first, LANES)]
        copy = pltpu.make_async_copy(results.at[scale], to, copied.at[scale])
        copy.start()
        return copy

    _loop(height // rows, sort)
    copies = [write(0)]
    for j, (taps, mixing) in enumerate(scales):
        _convolve(padded, taps, radius, qkv)

        def mix(i, mixing=mixing):
            here = pl.ds(i * rows, rows)
            for part in range(3):
                mixed = _dot(qkv[part, here].reshape(rows * width, LANES), mixing[part])
                qkv[part, here] = mixed.astype(x.dtype).reshape(rows, width, LANES)

        _loop(height // rows, mix)
        copies.append(write(j + 1))
    for copy in copies:
        copy.wait()


def _loop(count, body):
    jax.lax.fori_loop(0, count, lambda i, _: body(i), None)


def _clear_border(padded, radius, height, width):
    """Zeroes the pixels around the image."""
    edge = jnp.zeros((3, radius, *padded.shape[2:]), padded.dtype)
    padded[:, :radius] = padded[:, radius + height :] = edge
    side = jnp.zeros((3, height, BORDER, LANES), padded.dtype)
    padded[:, radius : radius + height, :BORDER] = side
    padded[:, radius : radius + height, BORDER + width :] = side


def _convolve(padded, taps, radius, out):
    """Writes the depthwise convolution of the padded image to `out`."""
    _, height, width, _ = out.shape
    size = math.isqrt(taps.shape[0])
    y_shift, x_shift = radius - size // 2, BORDER - size // 2
    for part in range(3):

        def row(y, _, part=part):
            total = 0.0
            for p, q in np.ndindex(size, size):
                k, column = p * size + q, x_shift + q
                tap = taps[k : k + 1, part * LANES : (part + 1) * LANES]
                total += padded[part, y_shift + y + p, column : column + width] * tap
            out[part, y] = total.astype(out.dtype)

        jax.lax.fori_loop(0, height, row, None, unroll=math.gcd(height, max(1, PIXELS // width)))


def _attend(head_dim, qkv, state, out):
    """Writes the attention of sorted q, k and v to `out`."""
    _, height, width, _ = qkv.shape
    rows = math.gcd(height, max(1, TOKENS // width))
    head = [jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), i) // head_dim for i in range(2)]
    state[...] = jnp.zeros_like(state)

    def read(part, i):
        return qkv[part, pl.ds(i * rows, rows)].reshape(rows * width, LANES)

    def add(i):
        k, v = jnp.maximum(read(1, i), 0), read(2, i)
        for half, values in enumerate((v, jnp.ones_like(v))):
            state[half] += _dot(k, values, (0, 0))

    def average(i):
        q = jnp.maximum(read(0, i), 0)
        numerator, denominator = (
            _dot(q, jnp.where(head[0] == head[1], state[half], 0.0).astype(q.dtype))
            for half in range(2)
        )
        average = (numerator / (denominator + EPSILON)).astype(out.dtype)
        out[pl.ds(i * rows, rows)] = average.reshape(rows, width, LANES)

    _loop(height // rows, add)
    _loop(height // rows, average)
