"""The middle of Mix-FFN for GPU (Pallas Triton), forward and backward.

A program takes a strip of the image, a few columns wide and all rows high, for some channels, and
keeps the three rows that the convolution needs in registers: every pixel is read three times (from
the caches after the first) and its SiLU computed three times. The backward pass has two kernels:
one for the cotangents of the convolution's results, one for those of its inputs and weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sana_jax.kernels import triton
from sana_jax.kernels.block_sizes import GPU
from sana_jax.kernels.triton import plgpu

COLUMNS, CHANNELS = GPU["glumbconv_columns"], GPU["glumbconv_channels"]  # of a strip


def supported() -> bool:
    """Returns True if JAX has the kernels' compiler."""
    return triton.AVAILABLE


def forward(value, gate, bias, kernel, depthwise_bias):
    """Returns value * silu(gate) after bias, SiLU, 3x3 and bias; shapes as in tpu.py."""
    out = jax.ShapeDtypeStruct(value.shape, value.dtype)
    return _call(_forward_kernel, (value, gate, bias, kernel, depthwise_bias), out, "forward")


def backward(value, gate, bias, kernel, depthwise_bias, cotangent):
    """Returns forward's result and the cotangents of its inputs; those of weights in float32."""
    out = jax.ShapeDtypeStruct(value.shape, value.dtype)
    image = jax.ShapeDtypeStruct(value.shape, jnp.float32)
    operands = (value, gate, bias, kernel, depthwise_bias, cotangent)
    out, *d_results = _call(_results_kernel, operands, (out, image, image), "results")

    # 22 sums a strip: 2 of bias, 2 of depthwise bias, 2 x 9 of taps.
    strips = pl.cdiv(value.shape[2], COLUMNS)
    sums = jax.ShapeDtypeStruct((value.shape[0] * strips, 22, value.shape[3]), jnp.float32)
    image = jax.ShapeDtypeStruct(value.shape, value.dtype)
    operands = (value, gate, bias, kernel, *d_results)
    d_value, d_gate, sums = _call(_inputs_kernel, operands, (image, image, sums), "inputs")
    sums = jnp.sum(sums, axis=0)  # over strips
    d_kernel = jnp.moveaxis(sums[4:].reshape(2, 9, -1), 1, 0)
    return out, d_value, d_gate, sums[:2], d_kernel, sums[2:4]


def _call(kernel, operands, out_shape, name):
    batch, height, width, channels = operands[0].shape
    kernel = partial(kernel, height=height, width=width, channels=channels)
    grid = (batch, pl.cdiv(width, COLUMNS), pl.cdiv(channels, CHANNELS))
    return triton.call(kernel, operands, out_shape, grid, f"glumbconv_{name}")


class _Strip:
    """Loads and stores the rows of one strip of one image."""

    def __init__(self, height, width, channels):
        self.height, self.width = height, width
        self.image, self.strip, block = (pl.program_id(i) for i in range(3))
        self.left = self.strip * COLUMNS
        self.lanes = block * CHANNELS + jnp.arange(CHANNELS)
        self.lane_mask = self.lanes < channels
        self.read_lanes = jnp.minimum(self.lanes, channels - 1)
        self.index = self.image * pl.cdiv(width, COLUMNS) + self.strip

    def row(self, ref, y, shift=0):
        """Returns row y, (COLUMNS, CHANNELS) in float32, and the mask of its part in the image."""
        x = self.left + shift + jnp.arange(COLUMNS)
        inside = (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        mask = inside[:, None] & self.lane_mask[None]
        y, x = jnp.clip(y, 0, self.height - 1), jnp.clip(x, 0, self.width - 1)
        where = self.image, y, x[:, None], self.read_lanes[None]
        return plgpu.load(ref.at[where], mask=mask, other=0.0).astype(jnp.float32), mask

    def put(self, ref, y, row):
        """Stores row y, (COLUMNS, CHANNELS), as far as it lies in the image."""
        x = self.left + jnp.arange(COLUMNS)
        mask = (x < self.width)[:, None] & self.lane_mask[None]
        where = self.image, y, x[:, None], self.lanes[None]
        plgpu.store(ref.at[where], row.astype(ref.dtype), mask=mask)

    def vector(self, ref, *where):
        """Returns weights of the strip's channels, (1, CHANNELS) in float32."""
        where = (*map(jnp.int32, where), self.read_lanes)
        loaded = plgpu.load(ref.at[where], mask=self.lane_mask, other=0.0)
        return loaded.astype(jnp.float32)[None]

    def taps(self, ref, half):
        """Returns 3 rows of 3 taps of the value (half 0) or the gate (half 1)."""
        return [[self.vector(ref, 3 * p + q, half) for q in range(3)] for p in range(3)]


def _silu(x):
    return x * jax.nn.sigmoid(x)


def _activated(strip, ref, bias, y):
    """Returns silu(image + bias) of row y, shifted by -1, 0 and 1 columns; zero outside."""
    rows = []
    for shift in (-1, 0, 1):
        x, mask = strip.row(ref, y, shift)
        rows.append(jnp.where(mask, _silu(x + bias), 0.0))
    return rows


def _convolved(rows, taps):
    return sum(rows[p][q] * taps[p][q] for p in range(3) for q in range(3))


def _results(strip, value_ref, gate_ref, bias_ref, kernel_ref, depthwise_ref, use):
    """Calls use(y, value, gate) with the convolution's results, row by row."""
    images = (value_ref, gate_ref)
    biases = [strip.vector(bias_ref, half) for half in range(2)]
    ends = [strip.vector(depthwise_ref, half) for half in range(2)]
    taps = [strip.taps(kernel_ref, half) for half in range(2)]

    def read(y):
        return [_activated(strip, images[half], biases[half], y) for half in range(2)]

    def step(y, rows):
        above, here = rows
        below = read(y + 1)
        value, gate = (
            _convolved((above[half], here[half], below[half]), taps[half]) + ends[half]
            for half in range(2)
        )
        use(y, value, gate)
        return here, below

    jax.lax.fori_loop(0, strip.height, step, (read(-1), read(0)))


def _forward_kernel(value_ref, gate_ref, bias_ref, kernel_ref, depthwise_ref, out_ref, **sizes):
    strip = _Strip(**sizes)

    def use(y, value, gate):
        strip.put(out_ref, y, value * _silu(gate))

    _results(strip, value_ref, gate_ref, bias_ref, kernel_ref, depthwise_ref, use)


def _results_kernel(
    value_ref,
    gate_ref,
    bias_ref,
    kernel_ref,
    depthwise_ref,
    cotangent_ref,
    out_ref,
    *d_refs,
    **sizes,
):
    strip = _Strip(**sizes)

    def use(y, value, gate):
        cotangent, _ = strip.row(cotangent_ref, y)
        s = jax.nn.sigmoid(gate)
        strip.put(out_ref, y, value * gate * s)
        strip.put(d_refs[0], y, cotangent * gate * s)
        strip.put(d_refs[1], y, cotangent * value * s * (1 + gate * (1 - s)))

    _results(strip, value_ref, gate_ref, bias_ref, kernel_ref, depthwise_ref, use)


def _inputs_kernel(
    value_ref,
    gate_ref,
    bias_ref,
    kernel_ref,
    d_value_result_ref,
    d_gate_result_ref,
    d_value_ref,
    d_gate_ref,
    sums_ref,
    **sizes,
):
    strip = _Strip(**sizes)

    def add(x):
        return jnp.sum(x, axis=0)

    halves = (
        (value_ref, d_value_result_ref, d_value_ref),
        (gate_ref, d_gate_result_ref, d_gate_ref),
    )
    for half, (image_ref, d_result_ref, d_image_ref) in enumerate(halves):
        # The cotangent of an input is a convolution with the flipped taps.
        bias, taps = strip.vector(bias_ref, half), strip.taps(kernel_ref, half)
        flipped = [line[::-1] for line in taps[::-1]]

        def read(y, ref=d_result_ref):
            return [strip.row(ref, y, shift)[0] for shift in (-1, 0, 1)]

        def step(
            y, carry, read=read, image_ref=image_ref, out=d_image_ref, bias=bias, taps=flipped
        ):
            above, here, sums = carry
            rows = above, here, read(y + 1)
            x, mask = strip.row(image_ref, y)
            x = x + bias
            s = jax.nn.sigmoid(x)
            d_image = _convolved(rows, taps) * s * (1 + x * (1 - s))
            d_image = jnp.where(mask, d_image, 0.0)
            strip.put(out, y, d_image)
            # Sums of bias, depthwise bias and the nine taps over this row.
            u = jnp.where(mask, x * s, 0.0)
            new = [add(d_image), add(here[1])]
            new += [add(rows[2 - p][2 - q] * u) for p in range(3) for q in range(3)]
            return here, rows[2], [a + b for a, b in zip(sums, new, strict=True)]

        start = read(-1), read(0), [jnp.zeros((CHANNELS,), jnp.float32)] * 11
        *_, sums = jax.lax.fori_loop(0, strip.height, step, start)
        # Rows of sums_ref: bias, depthwise bias, taps of the value, taps of the gate.
        rows = [half, 2 + half, *range(4 + 9 * half, 13 + 9 * half)]
        for row, value in zip(rows, sums, strict=True):
            where = strip.index, jnp.int32(row), strip.lanes
            plgpu.store(sums_ref.at[where], value, mask=strip.lane_mask)
