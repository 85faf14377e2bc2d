"""Layer norm without weights, with a shift and scale per image: the kernel's specification.

    out = (x - mean) / sqrt(variance + 1e-6) * (1 + scale) + shift        over the channels

adaLN of DiT (arXiv 2212.09748, section 3.2), as SANA's blocks use it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-6


def modulated_norm(
    x: Float[Array, "B N C"], shift: Float[Array, "#B 1 C"], scale: Float[Array, "#B 1 C"]
) -> Float[Array, "B N C"]:
    """Returns LN(x) (1 + scale) + shift in x's dtype, computed in float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
    return (y * (1 + scale) + shift).astype(x.dtype)
