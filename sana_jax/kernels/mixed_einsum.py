"""Products of narrow numbers with float32 sums, on every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def einsum_float32(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Array:
    """jnp.einsum of two arrays with float32 sums and result, whatever their dtype.

    XLA's CPU backend has no batched bfloat16 product with a float32 result: it gets upcast copies,
    which elsewhere would only cost memory.
    """

    def upcast(x, y):
        return jnp.einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32))

    def narrow(x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    if x.dtype == y.dtype == jnp.float32:
        return upcast(x, y)
    return jax.lax.platform_dependent(x, y, cpu=upcast, default=narrow)
