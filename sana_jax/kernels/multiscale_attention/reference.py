"""EfficientViT's multi-scale attention (arXiv 2205.14756): the specification of the kernel.

    mixed = grouped_1x1(depthwise(qkv))         for each scale, within each head's q, k and v
    out = [attention(qkv) | attention(mixed) | ...]

Channels of qkv are [q | k | v] of the first head, of the second, and so on.
"""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from sana_jax.kernels.glumbconv.reference import depthwise_conv
from sana_jax.kernels.linear_attention.reference import linear_attention

Scale = tuple[Float[Array, "_ _ C3"], Float[Array, "G D D"]]  # depthwise, then grouped 1x1


def mix(qkv: Float[Array, "B H W C3"], scale: Scale) -> Float[Array, "B H W C3"]:
    """Mixes q, k and v over a neighbourhood: depthwise, then within each of G = C3 / D groups."""
    depthwise, pointwise = scale
    x = depthwise_conv(qkv, depthwise).astype(qkv.dtype)
    x = rearrange(x, "b h w (g d) -> b h w g d", d=pointwise.shape[-1])
    x = jnp.einsum("bhwgd,gde->bhwge", x, pointwise.astype(qkv.dtype))
    return rearrange(x, "b h w g d -> b h w (g d)")


def multiscale_attention(
    qkv: Float[Array, "B H W C3"], scales: tuple[Scale, ...], head_dim: int
) -> Float[Array, "B H W C"]:
    """Returns the heads of qkv, then those of each scale, in qkv's dtype."""
    height = qkv.shape[1]
    wide = jnp.concatenate([qkv, *(mix(qkv, scale) for scale in scales)], axis=-1)
    q, k, v = rearrange(wide, "b h w (n s d) -> s b (h w) n d", s=3, d=head_dim)
    return rearrange(linear_attention(q, k, v), "b (h w) n d -> b h w (n d)", h=height)
