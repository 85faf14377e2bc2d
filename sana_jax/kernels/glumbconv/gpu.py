"""The middle of Mix-FFN for GPU (Pallas Triton), forward and backward.

A program takes a strip of the image, a few columns and some rows, for some channels. Every column
of a row is a vector of its own: Triton cannot shift a block, but names of vectors can be shifted.
So SiLU is computed once for each vector, and its nine products go to the sums of three rows, two of
which are carried on to the next row. The backward pass has two kernels: one for the cotangents of
the convolution's results, one for those of its inputs and weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sana_jax.kernels import triton
from sana_jax.kernels.block_sizes import GPU
from sana_jax.kernels.triton import plgpu

COLUMNS, CHANNELS = GPU["glumbconv_columns"], GPU["glumbconv_channels"]  # of a strip
PROGRAMS, ROWS = GPU["glumbconv_programs"], GPU["glumbconv_rows"]
# Stands for pixels outside the image, as in api.py. That SiLU makes it zero is seen to here, not
# left to how the fast tanh ends.
OUTSIDE = -1e4


def supported() -> bool:
    """Returns True if JAX has the kernels' compiler."""
    return triton.AVAILABLE


def forward(images, bias, kernel, depthwise_bias):
    """Returns value * silu(gate) after bias, SiLU, 3x3 and bias, (B, H, W, C).

    `images` are value and gate, (B, H, W, C) each, or one array of both, (B, H, W, 2 C). Weights:
    bias (2, C), kernel (9, 2, C), depthwise_bias (2, C).
    """
    out = _image(images, bias, images[0].dtype)
    return _call(_forward_kernel, images, (bias, kernel, depthwise_bias), out, "forward")


def backward(images, bias, kernel, depthwise_bias, cotangent):
    """Returns forward's result and the cotangents of its inputs; those of weights in float32."""
    weights = bias, kernel, depthwise_bias
    out, d_result = (_image(images, bias, dtype) for dtype in (images[0].dtype, jnp.float32))
    operands = *weights, cotangent
    out, *d_results = _call(_results_kernel, images, operands, (out, d_result, d_result), "results")

    # 22 sums a strip: 2 of bias, 2 of depthwise bias, 2 x 9 of taps.
    batch, height, width, _ = images[0].shape
    strips = batch * _strips(height, width, bias.shape[1], batch)[0]
    sums = jax.ShapeDtypeStruct((strips, 22, bias.shape[1]), jnp.float32)
    d_images = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in images)
    operands = bias, kernel, *d_results
    *d_images, sums = _call(_inputs_kernel, images, operands, (*d_images, sums), "inputs")
    sums = jnp.sum(sums, axis=0)  # over strips
    d_kernel = jnp.moveaxis(sums[4:].reshape(2, 9, -1), 1, 0)
    return out, tuple(d_images), sums[:2], d_kernel, sums[2:4]


def _image(images, bias, dtype):
    return jax.ShapeDtypeStruct((*images[0].shape[:3], bias.shape[1]), dtype)


def _strips(height, width, channels, batch):
    """Returns the number of strips of an image, and the rows of a strip."""
    columns, rows = pl.cdiv(width, COLUMNS), height
    programs = columns * pl.cdiv(channels, CHANNELS) * batch
    while programs * pl.cdiv(height, rows) < PROGRAMS and rows > ROWS:
        rows = pl.cdiv(rows, 2)
    return columns * pl.cdiv(height, rows), rows


def _call(kernel, images, operands, out_shape, name):
    batch, height, width, _ = images[0].shape
    channels = operands[0].shape[1]
    strips, rows = _strips(height, width, channels, batch)
    sizes = dict(height=height, width=width, channels=channels, rows=rows)
    kernel = partial(kernel, halves=len(images), **sizes)
    # Neighbouring strips run at the same time: what they both read is then in a cache.
    grid = strips, pl.cdiv(channels, CHANNELS), batch
    operands, name = (*images, *operands), f"glumbconv_{name}"
    return triton.call(kernel, operands, out_shape, grid, name, warps=1, stages=1)


class _Strip:
    """Loads and stores vectors of a strip's channels, in float32."""

    def __init__(self, height, width, channels, rows):
        self.height, self.width, self.channels, self.rows = height, width, channels, rows
        columns = pl.cdiv(width, COLUMNS)
        strip, block, self.image = (pl.program_id(i) for i in range(3))
        self.left, self.top = strip % columns * COLUMNS, strip // columns * rows
        self.first = block * CHANNELS
        self.lane_mask = self.first + jnp.arange(CHANNELS) < channels
        self.index = self.image * pl.num_programs(0) + strip

    def halves(self, refs):
        """Returns the value's and the gate's (array, first channel), from one array or two."""
        return (refs[0], 0), (refs[-1], self.channels if len(refs) == 1 else 0)

    def vector(self, ref, *where):
        """Returns weights of the channels."""
        where = (*map(jnp.int32, where), pl.ds(self.first, CHANNELS))
        return plgpu.load(ref.at[where], mask=self.lane_mask, other=0.0).astype(jnp.float32)

    def pixel(self, half, y, x, outside):
        """Returns the channels of the pixel in row y and the strip's column x."""
        (ref, first), x = half, self.left + x
        inside = (y >= 0) & (y < self.height) & (x >= 0) & (x < self.width)
        where = self.image, y, x, pl.ds(first + self.first, CHANNELS)
        mask = self.lane_mask & inside
        return plgpu.load(ref.at[where], mask=mask, other=outside).astype(jnp.float32)

    def put(self, half, y, x, vector):
        """Stores the channels of a pixel, if it lies in the image."""
        (ref, first), x = half, self.left + x
        mask = self.lane_mask & (x < self.width) & (y < self.height)
        where = self.image, y, x, pl.ds(first + self.first, CHANNELS)
        plgpu.store(ref.at[where], vector.astype(ref.dtype), mask=mask)


def _results(strip, images, bias_ref, kernel_ref, depthwise_ref, use):
    """Calls use(y, x, value, gate) with the convolution's results of the strip."""
    halves, narrow = strip.halves(images), images[0].dtype.itemsize == 2
    taps = [[strip.vector(kernel_ref, i, half) for i in range(9)] for half in range(2)]
    half_biases = [0.5 * strip.vector(bias_ref, half) for half in range(2)]
    ends = [[strip.vector(depthwise_ref, half)] * COLUMNS for half in range(2)]

    def read(half, y):
        """Returns the pixels of row y after SiLU, with one more at either side."""
        for x in range(-1, COLUMNS + 1):
            h = _halved(strip.pixel(halves[half], y, x, OUTSIDE), half_biases[half])
            h = jnp.where(h > OUTSIDE / 4, h, 0.0)
            yield multiply_add(h, _tanh(h, narrow), h)

    def add(sums, pixels, taps):
        """Returns a row's sums with the products of three taps added."""
        for q, tap in enumerate(taps):
            sums = [multiply_add(pixels[x + q], tap, s) for x, s in enumerate(sums)]
        return sums

    def step(y, above, here):
        """Reads row y. Returns sums of the results' rows y - 1, now complete, y and y + 1."""
        rows = []
        for half in range(2):
            pixels = list(read(half, y))
            sums = above[half], here[half], ends[half]
            lines = taps[half][6:], taps[half][3:6], taps[half][:3]
            rows.append([add(s, pixels, line) for s, line in zip(sums, lines, strict=True)])
        return map(list, zip(*rows, strict=True))

    def finish(i, sums):
        y = strip.top + i
        done, *sums = step(y + 1, *sums)
        for x, (value, gate) in enumerate(zip(*done, strict=True)):
            use(y, x, value, gate)
        return sums

    _, _, here = step(strip.top - 1, ends, ends)
    _, *sums = step(strip.top, ends, here)
    jax.lax.fori_loop(0, strip.rows, finish, sums)


def _forward_kernel(*refs, halves, **sizes):
    images, weights, (out_ref,) = refs[:halves], refs[halves:-1], refs[-1:]
    strip = _Strip(**sizes)

    def use(y, x, value, gate):
        h = 0.5 * gate
        gate = multiply_add(h, _tanh(h, out_ref.dtype.itemsize == 2), h)
        strip.put((out_ref, 0), y, x, value * gate)

    _results(strip, images, *weights, use)


def _results_kernel(*refs, halves, **sizes):
    images, (*weights, cotangent_ref, out_ref, d_value_ref, d_gate_ref) = (
        refs[:halves],
        refs[halves:],
    )
    strip, narrow = _Strip(**sizes), out_ref.dtype.itemsize == 2

    def use(y, x, value, gate):
        cotangent = strip.pixel((cotangent_ref, 0), y, x, 0.0)
        s = _sigmoid(0.5 * gate, narrow)
        silu = gate * s
        strip.put((out_ref, 0), y, x, value * silu)
        strip.put((d_value_ref, 0), y, x, cotangent * silu)
        # The slope of SiLU is s + silu (1 - s).
        slope = multiply_add(silu, 1.0 - s, s)
        strip.put((d_gate_ref, 0), y, x, cotangent * value * slope)

    _results(strip, images, *weights, use)


def _inputs_kernel(*refs, halves, **sizes):
    images, (bias_ref, kernel_ref, *d_result_refs), (*d_image_refs, sums_ref) = (
        refs[:halves],
        refs[halves : halves + 4],
        refs[halves + 4 :],
    )
    strip, narrow = _Strip(**sizes), images[0].dtype.itemsize == 2
    ends = strip.halves(images), strip.halves(d_image_refs)
    for half, (image, d_image, ref) in enumerate(zip(*ends, d_result_refs, strict=True)):
        half_bias = 0.5 * strip.vector(bias_ref, half)
        taps = [strip.vector(kernel_ref, i, half) for i in range(9)]

        def read(y, ref=ref):
            return [strip.pixel((ref, 0), y, x, 0.0) for x in range(-1, COLUMNS + 1)]

        def step(i, carry, read=read, image=image, d_image=d_image, bias=half_bias, taps=taps):
            above, here, sums = carry
            y, (*sums, d_bias, d_depthwise) = strip.top + i, sums
            rows = above, here, read(y + 1)
            for x in range(COLUMNS):
                h = _halved(strip.pixel(image, y, x, OUTSIDE), bias)
                s = jnp.where(h > OUTSIDE / 4, _sigmoid(h, narrow), 0.0)
                u, d_u = 2.0 * h * s, jnp.zeros_like(h)
                # A tap led from this pixel to the result at the opposite place.
                for tap in range(9):
                    d = rows[2 - tap // 3][x + 2 - tap % 3]
                    d_u = multiply_add(d, taps[tap], d_u)
                    sums[tap] = multiply_add(d, u, sums[tap])
                d = d_u * multiply_add(u, 1.0 - s, s)
                strip.put(d_image, y, x, d)
                d_bias, d_depthwise = d_bias + d, d_depthwise + here[x + 1]
            return here, rows[2], [*sums, d_bias, d_depthwise]

        # The rows at either end belong to strips above and below as well.
        start = read(strip.top - 1), read(strip.top), [jnp.zeros((CHANNELS,), jnp.float32)] * 11
        *_, sums = jax.lax.fori_loop(0, strip.rows, step, start)
        # Rows of sums_ref: bias, depthwise bias, taps of the value, taps of the gate.
        rows = [*range(4 + 9 * half, 13 + 9 * half), half, 2 + half]
        for row, value in zip(rows, sums, strict=True):
            where = strip.index, jnp.int32(row), pl.ds(strip.first, CHANNELS)
            plgpu.store(sums_ref.at[where], value, mask=strip.lane_mask)


def _halved(pixel, half_bias):
    """Returns half of pixel + bias: silu(2 h) = h + h tanh(h)."""
    return multiply_add(pixel, jnp.full_like(pixel, 0.5), half_bias)


def _sigmoid(h, narrow):
    """Returns the sigmoid of 2 h."""
    return 0.5 * _tanh(h, narrow) + 0.5


def _tanh(x, narrow):
    """Returns tanh; `narrow`: for results of 16 bits, in a sixteenth of the instructions.

    It is off by up to 2^-11 then: SiLU by an eighth of what bfloat16 rounds.
    """
    return fast_tanh(x) if narrow else jnp.tanh(x)


# XLA lets Triton fuse no product with a sum, and Triton has no fast tanh: these two are written in
# PTX. The interpreter cannot read it, so tests put the formulas in their place.


def multiply_add(x, y, z):
    """Returns x y + z of float32 vectors, rounded once."""
    return _ptx("fma.rn.f32 $0, $1, $2, $3;", x, y, z)


def fast_tanh(x):
    """Returns a float32 vector's tanh, with a relative error of up to 2^-11."""
    return _ptx("tanh.approx.f32 $0, $1;", x)


def _ptx(instruction, *operands):
    (out,) = plgpu.elementwise_inline_asm(
        instruction,
        args=operands,
        constraints=",".join(["=f"] + ["f"] * len(operands)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return out
