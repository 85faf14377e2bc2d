"""The decoder's change of resolution in DC-AE (arXiv 2410.10733): the specification of the kernel.

out = conv(x enlarged to twice its size, nearest neighbour) + bias + channel_to_space(duplicate(x))
"""

from einops import rearrange, repeat
from jaxtyping import Array, Float

from sana_jax.kernels.convolution import convolve_doubled


def channel_to_space(x: Float[Array, "B H W C4"]) -> Float[Array, "B 2*H 2*W C4//4"]:
    """Unpacks every pixel into 2 x 2, in torch's order: channel slowest, then row, then column."""
    return rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=2, q=2)


def duplicate(x: Float[Array, "B H W c"], channels: int) -> Float[Array, "B H W C"]:
    """Repeats every channel several times in a row, to `channels` in all."""
    return repeat(x, "b h w c -> b h w (c g)", g=channels // x.shape[-1])


def upsample(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], bias: Float[Array, " D"]
) -> Float[Array, "B 2*H 2*W D"]:
    """Returns the result in x's dtype."""
    y = convolve_doubled(x, kernel) + bias.astype(x.dtype)
    return y + channel_to_space(duplicate(x, 4 * y.shape[-1]))
