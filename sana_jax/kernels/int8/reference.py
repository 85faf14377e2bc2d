"""Quantised products in plain jnp: the specification.

    scale = max |x| * float32(1 / 127)                      over a row, or over the inputs of an
    values = clip(round(x * (1 / scale)), -127, 127)        output; halves are rounded to even
    y = float32(sum_k x_values w_values) * x_scale * w_scale        the sum is int32, so exact

Symmetric, without zero points; -128 is not used. A row of zeros, or of numbers below TINY, gives
zeros. A row with NaN or an infinite number gives NaN: its scale is not finite. All that is rounded
is rounded in float32, so an integer computation elsewhere gets the same bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

LARGEST = 127
TINY = 1e-30  # of a scale, whose inverse would not be finite
# XLA divides by a constant so.
_INVERSE = np.float32(1 / LARGEST)


def scale_of(x: Float[Array, "..."], axis: int | tuple[int, ...] = -1) -> Float[Array, "..."]:
    """Returns the float32 scale of x's values; `axis` stays, 1 long."""
    return jnp.max(jnp.abs(x), axis, keepdims=True).astype(jnp.float32) * _INVERSE


def values_of(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Int8[Array, "..."]:
    """Returns x / scale as integers in -127 .. 127; what is beyond them is clipped."""
    inverse = jnp.where(scale > TINY, 1 / scale, 0)
    values = jnp.round(x.astype(jnp.float32) * inverse)
    return jnp.clip(values, -LARGEST, LARGEST).astype(jnp.int8)


def product(
    x: Float[Array, "*B C"],
    values: Int8[Array, "C D"],
    scale: Float[Array, "1 D"],
    row_scale: Float[Array, "*#B"] | None = None,
) -> Float[Array, "*B D"]:
    """Returns x times values * scale from int8 rows, in x's dtype.

    `row_scale` is that of all rows, which then hides NaN; else each row has its own.
    """
    own = scale_of(x) if row_scale is None else row_scale[..., None]
    rows = values_of(x, own)
    sums = jnp.dot(rows, values, preferred_element_type=jnp.int32).astype(jnp.float32)
    return (sums * own * scale[0]).astype(x.dtype)


def product_of_weights(
    x: Float[Array, "*B C"],
    values: Int8[Array, "C D"],
    scale: Float[Array, "1 D"],
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "*B D"]:
    """Returns x times values * scale in x's dtype, from float32 sums.

    The values are exact in bfloat16 too, and the scale is applied to the sums, so the weights are
    not rounded a second time.
    """
    kinds = dict(precision=precision, preferred_element_type=jnp.float32)
    sums = jnp.dot(x, values.astype(x.dtype), **kinds)
    return (sums * scale[0]).astype(x.dtype)
