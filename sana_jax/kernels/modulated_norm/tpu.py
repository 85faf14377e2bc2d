"""Modulated layer norm for TPU (Pallas Mosaic): x is read once, forward and backward.

With y = (x - mean) r, r = 1 / sqrt(variance + epsilon), and g = (1 + scale) cotangent:

    d_x     = r (g - mean(g) - y mean(g y)) + the cotangent of x's other uses
    d_shift = sum over tokens of cotangent        d_scale = sum over tokens of y cotangent
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.int8.rows import Rows, bytes_of, row_shapes, then_quantised
from sana_jax.kernels.modulated_norm.reference import EPSILON
from sana_jax.kernels.mosaic import compiler_params

TOKENS = TPU["modulated_norm"]  # of a grid step


def forward(x, shift, scale):
    """Returns the modulated norm of x (B, N, C); shift and scale are (B, 1, C) in float32."""
    (out,) = _call(_forward_kernel, (x,), (shift, scale), 1, 0)
    return out


def forward_rows(x, shift, scale) -> Rows:
    """Returns forward's result as int8 rows."""
    return Rows(*_call(_forward_kernel, (x,), (shift, scale), 0, 0, int8=True))


def backward(x, cotangent, residual, scale):
    """Returns the cotangents of x, shift and scale; `residual`, of x's other uses, is added."""
    return _call(_backward_kernel, (x, cotangent, residual), (scale,), 1, 2)


def _call(kernel, arrays, vectors, array_results, vector_results, int8=False):
    """Calls a kernel over (image, block of tokens); `int8`: its one result is int8 rows."""
    batch, tokens, channels = arrays[0].shape
    dtype = arrays[0].dtype
    rows = min(TOKENS, -(-tokens // 32) * 32)  # 32: a tile of int8 in the sublanes
    array = pl.BlockSpec((1, rows, channels), lambda b, i: (b, i, 0))
    vector = pl.BlockSpec((1, 1, channels), lambda b, i: (b, 0, 0))
    results = [jax.ShapeDtypeStruct(arrays[0].shape, dtype)] * array_results
    results += [jax.ShapeDtypeStruct((batch, 1, channels), jnp.float32)] * vector_results
    results += row_shapes(batch, tokens, channels) if int8 else ()
    body = partial(kernel, tokens=tokens)
    moved = (len(arrays) + array_results) * arrays[0].size * dtype.itemsize
    blocks = [(array, arrays[0])] * (len(arrays) + array_results)
    row_specs, scratches = [], []
    if int8:
        row_specs = [array, pl.BlockSpec((1, rows, 1), lambda b, i: (b, i, 0))]
        body, scratches = then_quantised(body), [pltpu.VMEM((1, rows, channels), dtype)]
        moved += bytes_of(results)
        blocks += [*zip(row_specs, results, strict=True), (array, arrays[0])]
    return pl.pallas_call(
        body,
        out_shape=results,
        grid=(batch, pl.cdiv(tokens, rows)),
        in_specs=[array] * len(arrays) + [vector] * len(vectors),
        out_specs=[array] * array_results + [vector] * vector_results + row_specs,
        scratch_shapes=scratches,
        compiler_params=compiler_params(("parallel", "arbitrary"), blocks),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        name=f"modulated_norm{kernel.__name__.removesuffix('_kernel')}{'_int8' * int8}",
    )(*arrays, *vectors)


def _normalise(x_ref):
    x = x_ref[0].astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    return x * r, r


def _forward_kernel(x_ref, shift_ref, scale_ref, out_ref, *, tokens):
    y, _ = _normalise(x_ref)
    out_ref[0] = (y * (1.0 + scale_ref[0]) + shift_ref[0]).astype(out_ref.dtype)


def _backward_kernel(
    x_ref,
    cotangent_ref,
    residual_ref,
    scale_ref,
    d_x_ref,
    d_shift_ref,
    d_scale_ref,
    *,
    tokens,
):
    y, r = _normalise(x_ref)
    cotangent = cotangent_ref[0].astype(jnp.float32)
    rows = cotangent.shape[0]
    g = (1.0 + scale_ref[0]) * cotangent
    d_x = r * (
        g - jnp.mean(g, axis=-1, keepdims=True) - y * jnp.mean(g * y, axis=-1, keepdims=True)
    )
    d_x_ref[0] = (d_x + residual_ref[0].astype(jnp.float32)).astype(d_x_ref.dtype)
    # Rows behind the last token hold anything, and must not count in the sums.
    d_scale = y * cotangent
    if tokens % rows:
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        valid = row < tokens - pl.program_id(1) * rows
        cotangent, d_scale = jnp.where(valid, cotangent, 0.0), jnp.where(valid, d_scale, 0.0)
    first = pl.program_id(1) == 0
    for ref, value in ((d_shift_ref, cotangent), (d_scale_ref, d_scale)):
        ref[0] = jnp.where(first, 0.0, ref[0]) + jnp.sum(value, axis=0, keepdims=True)
