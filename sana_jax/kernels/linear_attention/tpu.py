"""ReLU linear attention for TPU (Pallas Mosaic), forward and backward.

Heads lie side by side in the lanes, as the projection leaves them, four of width 32 to a group of
128. A product of two groups mixes their heads; a mask keeps the diagonal blocks. With T, the state
of values that are all one, the denominator comes out of the same products as the numerator:

    S = k^T v    T = k^T 1    out = (q S) / (q T + epsilon)          q, k after ReLU

so every step, forward and backward, is a matrix product and a few element-wise operations. `state`
holds the blocks of S above those of T, (2 D, C), summed over tokens; `sequence` sharding sums it
over devices between the two halves of either pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.int8.rows import Rows, bytes_of, row_shapes, then_quantised
from sana_jax.kernels.mosaic import LANES, compiler_params, whole_lanes

TOKENS = TPU["linear_attention"]  # of a grid step in bfloat16; half as many in float32


def supported(channels: int, head_dim: int) -> bool:
    """Returns True if heads fill groups of lanes, and rows of the state fill sublanes."""
    return LANES % head_dim == 0 and head_dim % 8 == 0 and channels % head_dim == 0


def state(qkv: Float[Array, "B N C3"], head_dim: int) -> Float[Array, "B D2 C"]:
    """Returns S and T, in float32, of q, k and v side by side in `qkv`."""
    return _call(_state_kernel, qkv, head_dim, ins=("kv",), out="state", name="state")


def apply(
    qkv: Float[Array, "B N C3"], total: Float[Array, "B D2 C"], head_dim: int, epsilon: float
) -> Float[Array, "B N C"]:
    """Returns every query's average of the values, from the state summed over all tokens."""
    return _call(
        partial(_apply_kernel, epsilon=epsilon),
        qkv,
        head_dim,
        (total,),
        ins=("q", "state"),
        out="rows",
        name="apply",
    )


def apply_rows(qkv, total, head_dim: int, epsilon: float) -> Rows:
    """Returns apply's result as int8 rows."""
    kernel = partial(_apply_kernel, epsilon=epsilon)
    ins = dict(ins=("q", "state"), out="int8", name="apply")
    return _call(kernel, qkv, head_dim, (total,), **ins)


def state_cotangent(qkv, total, cotangent, head_dim: int, epsilon: float):
    """Returns the cotangent of the state (B, 2 D, C): the first half of the backward pass."""
    return _call(
        partial(_state_cotangent_kernel, epsilon=epsilon),
        qkv,
        head_dim,
        (total, cotangent),
        ins=("q", "state", "rows"),
        out="state",
        name="state_cotangent",
    )


def cotangents(qkv, total, total_cotangent, cotangent, head_dim: int, epsilon: float):
    """Returns the cotangents of q, k and v, side by side (B, N, 3 C): the second half."""
    return _call(
        partial(_cotangents_kernel, epsilon=epsilon),
        qkv,
        head_dim,
        (total, total_cotangent, cotangent),
        ins=("qkv", "state", "state", "rows"),
        out="qkv",
        name="cotangents",
    )


def _call(kernel, qkv, head_dim, others=(), *, ins, out, name):
    """Calls a kernel over (image, block of tokens); `ins` and `out` name parts of the arrays.

    The result of `out` "int8" is that of "rows", as int8 rows.
    """
    batch, tokens, channels = qkv.shape
    channels //= 3
    rows = min(TOKENS * 2 // qkv.dtype.itemsize, -(-tokens // 32) * 32)
    # A block starts at a whole tile, so that of the keys may begin with the last queries.
    key_start = channels // LANES * LANES
    kv_width = 3 * channels - key_start
    shapes = {
        "qkv": (tokens, 3 * channels),
        "rows": (tokens, channels),
        "state": (2 * head_dim, channels),
    }

    def token_block(width):
        return pl.BlockSpec((1, rows, width), lambda b, i: (b, i, 0))

    specs = {
        "qkv": token_block(3 * channels),
        "rows": token_block(channels),
        "q": token_block(min(whole_lanes(channels), 3 * channels)),
        "kv": pl.BlockSpec(
            (
                pl.Element(1),
                pl.Element(rows, (0, -tokens % rows)),
                pl.Element(whole_lanes(kv_width), (0, -kv_width % LANES)),
            ),
            lambda b, i: (b, i * rows, key_start),
        ),
        "state": pl.BlockSpec((1, *shapes["state"]), lambda b, i: (b, 0, 0)),
    }

    # The cost: matrix products of whole groups, and bytes moved.
    options = dict(channels=channels, head_dim=head_dim, tokens=tokens)
    groups = -(-channels // LANES)
    products = {"state": 2, "apply": 2, "state_cotangent": 4, "cotangents": 6}[name]
    sizes = {"qkv": 3, "rows": 1, "q": 1, "kv": 2, "state": 0, "int8": 0}  # (tokens, channels)
    moved = sum(sizes[kind] for kind in (*ins, out)) * tokens * channels * qkv.dtype.itemsize
    moved += (*ins, out).count("state") * 2 * head_dim * channels * 4
    body, scratches = partial(kernel, **options), []
    if out == "int8":
        result = row_shapes(batch, *shapes["rows"])
        out_specs = Rows(specs["rows"], token_block(1))
        body, scratches = then_quantised(body), [pltpu.VMEM((1, rows, channels), qkv.dtype)]
        moved += bytes_of(result) // batch
    else:
        dtype = jnp.float32 if out == "state" else qkv.dtype
        result, out_specs = jax.ShapeDtypeStruct((batch, *shapes[out]), dtype), specs[out]
    in_specs = [specs[kind] for kind in ins]
    arrays = qkv, *others, *jax.tree.leaves(result)
    blocks = list(zip(jax.tree.leaves((in_specs, out_specs)), arrays, strict=True))
    return pl.pallas_call(
        body,
        out_shape=result,
        grid=(batch, pl.cdiv(tokens, rows)),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratches,
        compiler_params=compiler_params(("parallel", "arbitrary"), blocks),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * tokens * groups * LANES * LANES * products,
            bytes_accessed=batch * moved,
            transcendentals=0,
        ),
        name=f"linear_attention_{name}",
    )(qkv, *others)


def _groups(channels):
    """Returns (first lane, number of lanes) of every group of heads."""
    return [(g, min(LANES, channels - g)) for g in range(0, channels, LANES)]


def _dot(x, y, contract, dtype):
    """Returns a product with float32 sums, exact if `dtype` is float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = ((contract[:1], contract[1:]), ((), ()))
    x, y = x.astype(dtype), y.astype(dtype)
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _same_head(width, head_dim):
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))
    return jax.lax.div(row, head_dim) == jax.lax.div(column, head_dim)


def _pack(block, head_dim):
    """Returns the diagonal blocks of a (w, w) product side by side, (D, w)."""
    width = block.shape[0]
    block = jnp.where(_same_head(width, head_dim), block, 0.0)
    return sum(block[i : i + head_dim] for i in range(0, width, head_dim))


def _unpack(packed, head_dim):
    """Returns the (w, w) block-diagonal matrix of (D, w)."""
    width = packed.shape[1]
    block = jnp.concatenate([packed] * (width // head_dim), axis=0)
    return jnp.where(_same_head(width, head_dim), block, 0.0)


def _valid_rows(rows, tokens):
    """Returns True for each row of this block that is a token; None if all are."""
    if tokens % rows == 0:
        return None
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return row < tokens - pl.program_id(1) * rows


def _only(valid, x):
    return x if valid is None else jnp.where(valid, x, jnp.zeros_like(x))


def _accumulate(ref, index, value):
    first = pl.program_id(1) == 0
    ref[index] = jnp.where(first, 0.0, ref[index]) + value


def _relu(x):
    return jnp.maximum(x, jnp.zeros_like(x))


def _state_kernel(kv_ref, out_ref, *, channels, head_dim, tokens):
    dtype = kv_ref.dtype
    valid = _valid_rows(kv_ref.shape[1], tokens)
    shift = channels % LANES  # lane of the first key in the block
    for start, width in _groups(channels):
        k = kv_ref[0, :, shift + start : shift + start + width]
        v = kv_ref[0, :, shift + channels + start : shift + channels + start + width]
        k, v = _only(valid, _relu(k)), _only(valid, v)
        ones = jnp.ones_like(v)
        lanes = slice(start, start + width)
        for i, values in enumerate((v, ones)):
            packed = _pack(_dot(k, values, (0, 0), dtype), head_dim)
            _accumulate(out_ref, (0, slice(i * head_dim, (i + 1) * head_dim), lanes), packed)


def _numerator_denominator(q, state, head_dim, epsilon):
    """Returns q S, q T + epsilon, S and T."""
    dtype = q.dtype
    s, t = _unpack(state[:head_dim], head_dim), _unpack(state[head_dim:], head_dim)
    numerator, denominator = _dot(q, s, (1, 0), dtype), _dot(q, t, (1, 0), dtype)
    return numerator, denominator + epsilon, s, t


def _apply_kernel(q_ref, state_ref, out_ref, *, channels, head_dim, tokens, epsilon):
    for start, width in _groups(channels):
        lanes = slice(start, start + width)
        q = _relu(q_ref[0, :, lanes])
        numerator, denominator, _, _ = _numerator_denominator(
            q, state_ref[0, :, lanes], head_dim, epsilon
        )
        out_ref[0, :, lanes] = (numerator / denominator).astype(out_ref.dtype)


def _output_cotangents(q, state, cotangent, head_dim, epsilon):
    """Returns the cotangents of q S and q T, and S and T."""
    numerator, denominator, s, t = _numerator_denominator(q, state, head_dim, epsilon)
    d_numerator = cotangent.astype(jnp.float32) / denominator
    d_denominator = -d_numerator * (numerator / denominator)
    return d_numerator, d_denominator, s, t


def _state_cotangent_kernel(
    q_ref, state_ref, cotangent_ref, out_ref, *, channels, head_dim, tokens, epsilon
):
    dtype = q_ref.dtype
    valid = _valid_rows(q_ref.shape[1], tokens)
    for start, width in _groups(channels):
        lanes = slice(start, start + width)
        q = _relu(q_ref[0, :, lanes])
        both = _output_cotangents(
            q, state_ref[0, :, lanes], cotangent_ref[0, :, lanes], head_dim, epsilon
        )
        for i, cotangent in enumerate(both[:2]):
            product = _dot(_only(valid, q), _only(valid, cotangent), (0, 0), dtype)
            rows = slice(i * head_dim, (i + 1) * head_dim)
            _accumulate(out_ref, (0, rows, lanes), _pack(product, head_dim))


def _cotangents_kernel(
    qkv_ref,
    state_ref,
    total_ref,
    cotangent_ref,
    out_ref,
    *,
    channels,
    head_dim,
    tokens,
    epsilon,
):
    dtype = qkv_ref.dtype
    for start, width in _groups(channels):
        lanes = slice(start, start + width)
        q, k, v = (
            qkv_ref[0, :, part * channels + start : part * channels + start + width]
            for part in range(3)
        )
        d_numerator, d_denominator, s, t = _output_cotangents(
            _relu(q), state_ref[0, :, lanes], cotangent_ref[0, :, lanes], head_dim, epsilon
        )
        d_q = _dot(d_numerator, s, (1, 1), dtype) + _dot(d_denominator, t, (1, 1), dtype)
        d_s, d_t = (
            _unpack(total_ref[0, i * head_dim : (i + 1) * head_dim, lanes], head_dim)
            for i in range(2)
        )
        d_k = _dot(v, d_s, (1, 1), dtype) + _dot(jnp.ones_like(v), d_t, (1, 1), dtype)
        d_v = _dot(_relu(k), d_s, (1, 0), dtype)
        # ReLU passes on the cotangents of positive q and k only.
        zero = jnp.zeros_like(q)
        for part, (gradient, kept) in enumerate(((d_q, q > zero), (d_k, k > zero), (d_v, None))):
            gradient = gradient if kept is None else jnp.where(kept, gradient, 0.0)
            to = slice(part * channels + start, part * channels + start + width)
            out_ref[0, :, to] = gradient.astype(out_ref.dtype)
