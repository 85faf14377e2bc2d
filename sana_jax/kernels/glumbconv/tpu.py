"""The middle of Mix-FFN for TPU (Pallas Mosaic), forward and backward.

A grid step takes 128 channels of the value, the same 128 of the gate, and one image. SiLU fills a
float32 scratch with a border of zeros; the convolution reads it at nine offsets, which costs the
vector unit nothing: vector loads may start at any row. Rows keep eight columns free on either side
so that the rows themselves stay aligned. Value and gate are two arrays, so that their blocks are
aligned for every width; a ragged last block computes garbage that is never written.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.mosaic import LANES, compiler_params, half_silu, vmem_bytes

BORDER = 8  # columns, a sublane tile
FILL, CONVOLVE = TPU["glumbconv_fill"], TPU["glumbconv_convolve"]


def supported(height: int, width: int, itemsize: int) -> bool:
    """Returns True if 128 channels of an image fit into VMEM.

    The backward pass has six such images, with two buffers each, and four scratch images.
    """
    images = 12 * height * width * LANES * itemsize
    scratch = 4 * (height + 2) * (width + 2 * BORDER + 8) * LANES * 4
    return images + scratch < vmem_bytes()


def forward(value, gate, bias, kernel, depthwise_bias):
    """Returns value * silu(gate) after bias, SiLU, 3x3 and bias; images are (B, H, W, C)."""
    (out,) = _call(_forward_kernel, (value, gate), (bias, kernel, depthwise_bias), 1, 0)
    return out


def backward(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    bias: Float[Array, "2 C"],
    kernel: Float[Array, "9 2 C"],
    depthwise_bias: Float[Array, "2 C"],
    cotangent: Float[Array, "B H W C"],
):
    """Returns forward's result, then the cotangents of its five inputs.

    The cotangents of the weights are float32 sums over pixels.
    """
    return _call(_backward_kernel, (value, gate, cotangent), (bias, kernel, depthwise_bias), 3, 3)


def _call(body, images, weights, image_results, weight_results):
    """Calls a kernel over (block of channels, image).

    `weights` are bias (2, C), taps (9, 2, C) and depthwise bias (2, C), value first. The last
    `weight_results` results are float32 sums over all images, in the shapes of the first weights.
    """
    batch, height, width, channels = images[0].shape
    dtype = images[0].dtype
    image = pl.BlockSpec((1, height, width, LANES), lambda j, b: (b, 0, 0, j))
    vector = pl.BlockSpec((2, LANES), lambda j, b: (0, j))
    taps = pl.BlockSpec((9, 2, LANES), lambda j, b: (0, 0, j))
    weight_specs = [vector, taps, vector]
    columns = -(-width // 8) * 8 + 2 * BORDER
    scratch_shape = (2, height + 2, columns, LANES)
    scratches = 2 if weight_results else 1
    moved = (len(images) + image_results) * images[0].size * dtype.itemsize
    blocks = [(image, images[0])] * (len(images) + image_results)
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(images[0].shape, dtype)] * image_results
        + [jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in weights[:weight_results]],
        grid=(pl.cdiv(channels, LANES), batch),
        in_specs=[image] * len(images) + weight_specs,
        out_specs=[image] * image_results + weight_specs[:weight_results],
        scratch_shapes=[pltpu.VMEM(scratch_shape, jnp.float32)] * scratches,
        compiler_params=compiler_params(
            ("parallel", "arbitrary"), blocks, scratches * math.prod(scratch_shape) * 4
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=moved, transcendentals=3 * images[0].size
        ),
        name=f"glumbconv{body.__name__.removesuffix('_kernel')}",
    )(*images, *weights)


def _rows(height, width, pixels, body, start):
    """Loops over rows, unrolled to about `pixels` an iteration."""
    unroll = math.gcd(height, max(1, pixels // width))
    return jax.lax.fori_loop(0, height, body, start, unroll=unroll)


def _half_silu_slope(h):
    """Returns the derivative of silu at 2 h."""
    t = jnp.tanh(h)
    return (0.5 + 0.5 * t) * (1.0 + h * (1.0 - t))


def _clear_border(ref, half, height, width):
    """Zeroes the rows around a scratch image; `_put_row` zeroes the columns beside a row."""
    line = jnp.zeros((ref.shape[2], LANES), jnp.float32)
    ref[half, 0] = line
    ref[half, height + 1] = line


def _put_row(ref, half, y, row):
    width = row.shape[0]
    after = ref.shape[2] - BORDER - width
    ref[half, y + 1, :BORDER] = jnp.zeros((BORDER, LANES), jnp.float32)
    ref[half, y + 1, BORDER + width :] = jnp.zeros((after, LANES), jnp.float32)
    ref[half, y + 1, BORDER : BORDER + width] = row


def _neighbours(ref, half, y, width):
    """Yields the nine shifted rows around row y, tap by tap."""
    for dy in range(3):
        for dx in range(3):
            start = BORDER - 1 + dx
            yield ref[half, y + dy, start : start + width]


def _fill(images, bias_ref, u_ref):
    """Fills the scratch with silu(image + bias) of value and gate."""
    for half, ref in enumerate(images):
        _, height, width, _ = ref.shape
        _clear_border(u_ref, half, height, width)
        bias = 0.5 * bias_ref[half : half + 1].astype(jnp.float32)

        def row(y, _, half=half, ref=ref, bias=bias):
            h = 0.5 * ref[0, y].astype(jnp.float32) + bias
            _put_row(u_ref, half, y, half_silu(h))

        _rows(height, width, FILL, lambda y, _: row(y, _), None)


def _convolve(ref, half, y, width, taps, bias):
    out = bias
    for tap, row in zip(taps, _neighbours(ref, half, y, width), strict=True):
        out = out + row * tap
    return out


def _taps(kernel_ref, half):
    return [kernel_ref[i, half : half + 1].astype(jnp.float32) for i in range(9)]


def _forward_kernel(value_ref, gate_ref, bias_ref, kernel_ref, depthwise_ref, out_ref, u_ref):
    _, height, width, _ = value_ref.shape
    _fill((value_ref, gate_ref), bias_ref, u_ref)
    taps, biases = _convolution_weights(kernel_ref, depthwise_ref)

    def row(y, _):
        value = _convolve(u_ref, 0, y, width, taps[0], biases[0])
        half_gate = _convolve(u_ref, 1, y, width, taps[1], biases[1])
        out_ref[0, y] = (value * half_silu(half_gate)).astype(out_ref.dtype)

    _rows(height, width, CONVOLVE, row, None)


def _convolution_weights(kernel_ref, depthwise_ref):
    """Returns taps and biases of the value and of half the gate, the input of `half_silu`."""
    biases = [depthwise_ref[i : i + 1].astype(jnp.float32) for i in range(2)]
    taps = [_taps(kernel_ref, i) for i in range(2)]
    return [taps[0], [0.5 * tap for tap in taps[1]]], [biases[0], 0.5 * biases[1]]


def _fold(x):
    """Adds rows up to one tile of eight, which `accumulate` sums at the end."""
    width = x.shape[0]
    if width % 8:
        return jnp.sum(x, axis=0, keepdims=True)
    return sum(x[i : i + 8] for i in range(0, width, 8))


def _backward_kernel(
    value_ref,
    gate_ref,
    cotangent_ref,
    bias_ref,
    kernel_ref,
    depthwise_ref,
    out_ref,
    d_value_ref,
    d_gate_ref,
    d_bias_ref,
    d_kernel_ref,
    d_depthwise_ref,
    u_ref,
    d_ref,
):
    _, height, width, _ = value_ref.shape
    images = (value_ref, gate_ref)
    _fill(images, bias_ref, u_ref)
    taps, biases = _convolution_weights(kernel_ref, depthwise_ref)
    nothing = jnp.zeros((1 if width % 8 else 8, LANES), jnp.float32)

    def gate_row(y, sums):
        """Writes the result, and the cotangents of the convolution's two results to the scratch."""
        value = _convolve(u_ref, 0, y, width, taps[0], biases[0])
        half_gate = _convolve(u_ref, 1, y, width, taps[1], biases[1])
        t = jnp.tanh(half_gate)
        cotangent = cotangent_ref[0, y].astype(jnp.float32)
        activated = half_gate * t + half_gate
        out_ref[0, y] = (value * activated).astype(out_ref.dtype)
        d_value = cotangent * activated
        slope = (0.5 + 0.5 * t) * (1.0 + half_gate * (1.0 - t))
        d_gate = cotangent * value * slope
        for half, d in enumerate((d_value, d_gate)):
            _put_row(d_ref, half, y, d)
        return sums[0] + _fold(d_value), sums[1] + _fold(d_gate)

    # First pass over the rows: the result, and the cotangents of the convolution's results.
    for half in range(2):
        _clear_border(d_ref, half, height, width)
    d_depthwise = _rows(height, width, CONVOLVE, gate_row, (nothing, nothing))
    first = pl.program_id(1) == 0

    def accumulate(ref, index, sums):
        ref[index] = jnp.where(first, 0.0, ref[index]) + jnp.sum(sums, axis=0, keepdims=True)

    # Second pass: the convolution's transpose, SiLU's slope, and the sums of the weights.
    for half, d_image_ref in enumerate((d_value_ref, d_gate_ref)):
        plain_taps = _taps(kernel_ref, half)[::-1]  # a convolution's transpose is flipped
        bias = 0.5 * bias_ref[half : half + 1].astype(jnp.float32)

        def row(y, sums, half=half, out=d_image_ref, taps=plain_taps, bias=bias):
            """Writes the cotangent of the image, and adds this row to the sums of bias and taps."""
            u = u_ref[half, y + 1, BORDER : BORDER + width]
            d_u, tap_sums = 0.0, []
            for tap, d in zip(taps, _neighbours(d_ref, half, y, width), strict=True):
                d_u = d_u + d * tap
                tap_sums.append(_fold(d * u))
            h = 0.5 * images[half][0, y].astype(jnp.float32) + bias
            d_image = d_u * _half_silu_slope(h)
            out[0, y] = d_image.astype(out.dtype)
            return [a + b for a, b in zip(sums, [_fold(d_image), *tap_sums], strict=True)]

        d_bias, *d_taps = _rows(height, width, CONVOLVE, row, [nothing] * 10)
        vector = slice(half, half + 1)
        accumulate(d_bias_ref, (vector,), d_bias)
        accumulate(d_depthwise_ref, (vector,), d_depthwise[half])
        for i, d_tap in enumerate(reversed(d_taps)):
            accumulate(d_kernel_ref, (i, vector), d_tap)
