"""The end of DC-AE's decoder (arXiv 2410.10733): the specification of the kernel.

images = conv(relu(RMSNorm(x) * scale + shift)) + bias
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.convolution import convolve
from sana_jax.kernels.res_block.reference import EPSILON


def image_head(
    x: Float[Array, "B H W C"],
    scale: Float[Array, " C"],
    shift: Float[Array, " C"],
    kernel: Float[Array, "3 3 C D"],
    bias: Float[Array, " D"],
) -> Float[Array, "B H W D"]:
    """Returns the images in float32; the convolution is computed in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
    y = (y * scale.astype(jnp.float32) + shift.astype(jnp.float32)).astype(x.dtype)
    y = convolve(jax.nn.relu(y), kernel.astype(x.dtype)) + bias.astype(x.dtype)
    return y.astype(jnp.float32)
