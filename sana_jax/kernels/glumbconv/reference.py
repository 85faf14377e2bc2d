"""The middle of Mix-FFN in plain jnp: the specification of the kernel.

    u = silu(x + bias)                          point-wise, all 2h channels
    [a, g] = depthwise3x3(u) + depthwise_bias   zero padding
    out = a * silu(g)                           the gate is the second half

SANA (arXiv 2410.10629, section 2.3). The matrix products before and after it stay outside.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C"]
) -> Float[Array, "B H W C"]:
    """Depthwise K x K convolution, K odd, zero padding, stride 1; float32 sums and result.

    Written as K * K shifted multiply-adds: XLA's grouped convolution is 7 to 19 times slower on
    CPU. The barrier keeps XLA from computing x's producer again for every shift.
    """
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    radius = size // 2
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0))))
    shifts = (
        x[:, dy : dy + height, dx : dx + width].astype(jnp.float32)
        * kernel[dy, dx].astype(jnp.float32)
        for dy in range(size)
        for dx in range(size)
    )
    return sum(shifts)


def glumbconv(
    x: Float[Array, "B H W C2"],
    bias: Float[Array, " C2"],
    depthwise_kernel: Float[Array, "3 3 C2"],
    depthwise_bias: Float[Array, " C2"],
) -> Float[Array, "B H W C"]:
    """Bias, SiLU, depthwise 3x3, bias, gate; C2 = 2 C. Result in x's dtype, sums in float32."""
    u = jax.nn.silu((x + bias.astype(x.dtype)).astype(jnp.float32)).astype(x.dtype)
    u = depthwise_conv(u, depthwise_kernel) + depthwise_bias.astype(jnp.float32)
    value, gate = jnp.split(u, 2, axis=-1)
    return (value * jax.nn.silu(gate)).astype(x.dtype)
