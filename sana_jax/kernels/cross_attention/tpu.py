"""Softmax attention to a few hundred text rows for TPU (Pallas Mosaic), forward and backward.

A grid step takes a block of tokens, all heads and all text rows: the logits of a head stay in VMEM.
They are transposed, text rows in the sublanes: 300 rows fill 304 sublanes but would take 384 lanes,
and sums over text rows need no lane shuffles. Heads of 72 or 112 lie side by side in the lanes, as
the projection leaves them: where one begins inside a tile, reading it costs a shift. What heads
give is gathered transposed, where each begins at a whole tile, and turned in tiles at the end.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.mosaic import LANES, MIB, compiler_params, vmem_bytes, whole_lanes

LOG2_E = 1.4426950408889634
_RECIPROCAL = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal  # jax 0.10
TOKENS, BACKWARD_TOKENS = TPU["cross_attention"], TPU["cross_attention_backward"]


def forward(q, kv, bias, heads):
    """Returns the attention of q (B, N, C) to kv (B, L, 2 C); bias (B, L) of logits in float32."""
    batch, tokens, channels = q.shape
    rows = kv.shape[1]
    block = _block(tokens, rows, TOKENS)
    array = pl.BlockSpec((1, block, channels), lambda b, i: (b, i, 0))
    text = pl.BlockSpec((1, rows, 2 * channels), lambda b, i: (b, 0, 0))
    row_bias = pl.BlockSpec((1, rows, 1), lambda b, i: (b, 0, 0))
    blocks = (array, q), (text, kv), (row_bias, bias), (array, q)
    turned = pltpu.VMEM((channels, block), jnp.float32)
    return pl.pallas_call(
        partial(_forward_kernel, heads=heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch, pl.cdiv(tokens, block)),
        in_specs=[array, text, row_bias],
        out_specs=array,
        scratch_shapes=[turned],
        compiler_params=compiler_params(("parallel", "parallel"), blocks, _bytes(turned)),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * tokens * rows * channels,
            bytes_accessed=(2 * q.size + kv.size) * q.dtype.itemsize,
            transcendentals=batch * tokens * rows * heads,
        ),
        name="cross_attention_forward",
    )(q, kv, bias[:, :, None])


def _dot(x, y, contract):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _block(tokens, rows, most):
    """Returns the tokens of a grid step, as many in each: at most half of `most` above 384 rows."""
    steps = pl.cdiv(tokens, most if rows <= 384 else most // 2)
    return pl.cdiv(pl.cdiv(tokens, steps), 16) * 16


def _bytes(*scratch):
    return sum(4 * math.prod(x.shape[:-1]) * whole_lanes(x.shape[-1]) for x in scratch)


def _forward_kernel(q_ref, kv_ref, bias_ref, out_ref, turned_ref, *, heads):
    channels = q_ref.shape[2]
    width = channels // heads
    bias = bias_ref[0] * LOG2_E
    for h in range(heads):
        lanes, v_lanes = _lanes(h, width, channels)
        v = kv_ref[0, :, v_lanes]
        weights = _exponentials(q_ref[0, :, lanes], kv_ref[0, :, lanes], bias)
        share = _reciprocal(jnp.sum(weights, axis=0, keepdims=True), v.dtype)
        turned_ref[lanes] = _dot(v, weights.astype(v.dtype), (0, 0)) * share
    _turn(turned_ref, out_ref)


def _turn(turned_ref, out_ref):
    """Writes the transpose (tokens, C) of what the heads have left, (C, tokens)."""
    for start in range(0, turned_ref.shape[0], LANES):
        tile = slice(start, min(start + LANES, turned_ref.shape[0]))
        out_ref[0, :, tile] = turned_ref[tile].T.astype(out_ref.dtype)


def _lanes(h, width, channels):
    """Returns the lanes of head h's queries or keys, and of its values."""
    return tuple(slice(start + h * width, start + (h + 1) * width) for start in (0, channels))


def _exponentials(q, k, bias):
    """Returns a head's exp(logits) up to a factor per token, (L, tokens); `bias` is for exp2."""
    logits = _dot(k, q, (1, 1)) * (q.shape[1] ** -0.5 * LOG2_E) + bias
    return jnp.exp2(logits - jnp.max(logits, axis=0, keepdims=True))


def _reciprocal(x, dtype):
    """Returns 1 / x, as precise as bfloat16 needs if the network runs in it."""
    return _RECIPROCAL(x, approx=dtype == jnp.bfloat16)


def backward(q, kv, bias, cotangent, heads):
    """Returns the cotangents of q and kv, whose sums over tokens are float32."""
    batch, tokens, channels = q.shape
    rows = kv.shape[1]
    block = _block(tokens, rows, BACKWARD_TOKENS)
    array = pl.BlockSpec((1, block, channels), lambda b, i: (b, i, 0))
    text = pl.BlockSpec((1, rows, 2 * channels), lambda b, i: (b, 0, 0))
    row_bias = pl.BlockSpec((1, rows, 1), lambda b, i: (b, 0, 0))
    blocks = (array, q), (text, kv), (row_bias, bias), (array, q), (array, q), (text, kv)
    turned = pltpu.VMEM((channels, block), jnp.float32)
    sums = pltpu.VMEM((rows, 2 * channels), jnp.float32)
    return pl.pallas_call(
        partial(_backward_kernel, heads=heads, tokens=tokens),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, kv)],
        grid=(batch, pl.cdiv(tokens, block)),
        in_specs=[array, text, row_bias, array],
        out_specs=[array, text],
        scratch_shapes=[turned, sums],
        compiler_params=compiler_params(("parallel", "arbitrary"), blocks, _bytes(turned, sums)),
        cost_estimate=pl.CostEstimate(
            flops=10 * batch * tokens * rows * channels,
            bytes_accessed=(3 * q.size + 2 * kv.size) * q.dtype.itemsize,
            transcendentals=batch * tokens * rows * heads,
        ),
        name="cross_attention_backward",
    )(q, kv, bias[:, :, None], cotangent)


def _backward_kernel(
    q_ref,
    kv_ref,
    bias_ref,
    cotangent_ref,
    d_q_ref,
    d_kv_ref,
    turned_ref,
    sums_ref,
    *,
    heads,
    tokens,
):
    channels = q_ref.shape[2]
    width = channels // heads
    scale = width**-0.5
    first = pl.program_id(1) == 0
    bias = bias_ref[0] * LOG2_E
    for h in range(heads):
        lanes, v_lanes = _lanes(h, width, channels)
        q, k, v = q_ref[0, :, lanes], kv_ref[0, :, lanes], kv_ref[0, :, v_lanes]
        d_out = cotangent_ref[0, :, lanes]
        if tokens % q.shape[0]:  # the rows behind the last token may hold anything
            row = jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0)
            valid = row < tokens - pl.program_id(1) * q.shape[0]
            q, d_out = (jnp.where(valid, x, jnp.zeros_like(x)) for x in (q, d_out))
        weights = _exponentials(q, k, bias)
        weights = weights * _reciprocal(jnp.sum(weights, axis=0, keepdims=True), q.dtype)
        # The softmax backward, (L, tokens).
        d_weights = _dot(v, d_out, (1, 1))
        inner = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        d_logits = (weights * (d_weights - inner) * scale).astype(q.dtype)
        turned_ref[lanes] = _dot(k, d_logits, (0, 0))
        for to, left, right in ((lanes, d_logits, q), (v_lanes, weights.astype(q.dtype), d_out)):
            so_far = jnp.where(first, 0.0, sums_ref[:, to])
            sums_ref[:, to] = so_far + _dot(left, right, (1, 0))
    _turn(turned_ref, d_q_ref)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        d_kv_ref[0] = sums_ref[...].astype(d_kv_ref.dtype)


def supported(rows: int, channels: int) -> bool:
    """Returns True if VMEM holds the blocks and sums of the backward pass, and a head's logits."""
    block = _block(BACKWARD_TOKENS, rows, BACKWARD_TOKENS)
    text = 12 * rows * whole_lanes(2 * channels)  # two buffers both ways, and float32
    tokens = 16 * block * whole_lanes(channels)  # two buffers of three arrays, and float32
    logits = 3 * 4 * rows * block
    return rows <= 1024 and text + tokens + logits + 8 * MIB < vmem_bytes()
