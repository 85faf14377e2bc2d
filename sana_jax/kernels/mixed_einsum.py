"""Products of bfloat16 or other narrow numbers with float32 sums, on every platform."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def einsum_float32(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Array:
    """Computes jnp.einsum of two arrays of any dtype with float32 sums and a float32 result.

    XLA's CPU backend has no batched bfloat16 product with a float32 result: it gets upcast copies,
    which would only cost memory on other platforms.
    """

    def upcast(x, y):
        return jnp.einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32))

    def narrow(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    if x.dtype == y.dtype == jnp.float32:
        return upcast(x, y)
    return lax.platform_dependent(x, y, cpu=upcast, default=narrow)


def dense_float32(
    x: Float[Array, "*B C"], kernel: Float[Array, "C D"], precision: lax.Precision | None = None
) -> Float[Array, "*B D"]:
    """Returns x times kernel in x's dtype with float32 sums.

    Accelerators sum in float32 by themselves. XLA's CPU backend is twice as fast if a product of
    bfloat16 has a float32 result, unless there is only one row.
    """

    def usual(x, kernel):
        return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision)

    def wide(x, kernel):
        rows = x.reshape(-1, x.shape[-1])  # (B, C)
        out = jnp.dot(rows, kernel, precision=precision, preferred_element_type=jnp.float32)
        return out.astype(x.dtype).reshape(*x.shape[:-1], -1)

    if x.dtype != jnp.bfloat16 or x.size == x.shape[-1]:
        return usual(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=wide, default=usual)
