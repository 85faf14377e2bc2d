"""A residual block of DC-AE (arXiv 2410.10733): the specification of the kernel.

out = x + RMSNorm(conv2(silu(conv1(x) + bias1))) * scale + bias
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.convolution import convolve

EPSILON = 1e-5


def res_block(
    x: Float[Array, "B H W C"],
    kernel1: Float[Array, "3 3 C C"],
    bias1: Float[Array, " C"],
    kernel2: Float[Array, "3 3 C C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
) -> Float[Array, "B H W C"]:
    """Returns the result in x's dtype; the norm is computed in float32."""
    y = jax.nn.silu(convolve(x, kernel1) + bias1)
    y = convolve(y, kernel2).astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
    return x + (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
