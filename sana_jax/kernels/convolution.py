"""Convolutions, channels last: plain, and of a picture at twice its size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C D"], stride: int = 1, padding: int = 1
) -> Float[Array, "B I J D"]:
    """Cross-correlates, with `padding` rows and columns of zeros on every side, as torch does.

    The padding is explicit because "SAME" at stride 2 pads below and to the right only, which
    shifts the picture by a pixel against torch.

    Supports reverse-mode derivatives only. XLA's CPU backend puts the dimensions of a gradient's
    convolutions into its fast order, except inside a scan or another loop, where they take 50 times
    as long as the forward pass. So the gradient for CPU is written in that order.
    """
    return _plain(x, kernel, stride, padding)


_channels_last = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _plain(x, kernel, stride, padding):
    return _channels_last(x, kernel, (stride, stride), [(padding, padding)] * 2)


def _forward(x, kernel, stride, padding):
    return _plain(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, dy):
    def usual(x, kernel, dy):
        plain = partial(_plain, stride=stride, padding=padding)
        return jax.vjp(plain, x, kernel)[1](dy)

    def reordered(x, kernel, dy):
        size, steps = kernel.shape[0], (stride, stride)
        # Rows and columns at the far end that the last window does not reach.
        unused = [(side + 2 * padding - size) % stride for side in x.shape[1:3]]

        # The gradient of x: dy spread out by the stride, convolved with the flipped kernel.
        flipped, before = jnp.flip(kernel, (0, 1)).swapaxes(2, 3), size - 1 - padding
        sides = [(before, before + n) for n in unused]
        dx = _channels_last(dy, flipped, (1, 1), sides, lhs_dilation=steps)

        # The kernel's gradient sums over images, which take the place of the channels.
        x, dy = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
        sides = [(padding, padding - n) for n in unused]
        d_kernel = _channels_last(x, dy, (1, 1), sides, rhs_dilation=steps)
        return dx, d_kernel.transpose(1, 2, 0, 3)

    return lax.platform_dependent(*residuals, dy, cpu=reordered, default=usual)


convolve.defvjp(_forward, _backward)


def convolve_doubled(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]
) -> Float[Array, "B 2*H 2*W D"]:
    """Convolves x enlarged to twice its size by nearest neighbour, with 4/9 of the products.

    Of three neighbouring rows of the large picture, two are the same row of x. So a row of the
    result is two rows of x times two sums of the kernel's rows: k0 and k1 + k2 for an even row,
    k0 + k1 and k2 for an odd row; the same holds for columns. So one 2x2 convolution to 4 D
    channels gives all four kinds of pixels: even and odd rows and columns.
    """
    height, width = x.shape[1:3]
    features = kernel.shape[-1]

    def fold(kernel, axis):
        k0, k1, k2 = jnp.split(kernel.astype(jnp.float32), 3, axis)
        return [jnp.concatenate(pair, axis) for pair in ((k0, k1 + k2), (k0 + k1, k2))]

    # Four 2x2 kernels, by row and column, even and odd.
    kernels = [column for row in fold(kernel, 0) for column in fold(row, 1)]
    # Padded here: if a convolution's result is larger than its input, XLA turns its derivative into
    # a form that is slow on CPU.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = convolve(x, jnp.concatenate(kernels, -1).astype(x.dtype), 1, 0)  # (B, H + 1, W + 1, 4 D)
    # An odd row or column starts one later in the padded picture.
    pixels = [
        y[:, p : p + height, q : q + width, features * (2 * p + q) :][..., :features]
        for p, q in np.ndindex(2, 2)
    ]
    return rearrange(pixels, "(p q) b h w d -> b (h p) (w q) d", p=2)
