"""PatchGAN (pix2pix, arXiv 1611.07004, section 3.2.2): is every patch of an image real?

4x4 convolutions with one row of zeros on every side and LeakyReLU(0.2) between them; `layers` of
stride 2, each twice as wide as the one before (up to 8 x width), then two of stride 1:

    3 -> 64, stride 2;  64 -> 128, 2;  128 -> 256, 2;  256 -> 512, 1;  512 -> 1, 1

An output sees 70 x 70 pixels. All convolutions but the first and last are followed by a norm. The
published network has batch norm there, which would need running statistics as state, and ties a
logit to the other images of its device. Here the default is group norm, whose statistics are those
of one image and a few channels of a layer; those of "rms_norm" are of one pixel, which keeps
patches independent.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.models.layers import Axes, Dtype, RMSNorm, partitioned
from sana_jax.sharding import constrain

NORMS = ("group_norm", "rms_norm", "none")
GROUPS = 32  # fewer where they do not divide the channels
EPSILON = 1e-5


class Discriminator(nn.Module):
    """Maps images in [-1, 1] to float32 logits, one for each patch: high where it looks real."""

    width: int = 64  # of the first layer
    layers: int = 3  # of stride 2
    norm: str = "group_norm"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
        """Raises ValueError for images smaller than 3 * 2 ** layers, and for an unknown norm."""
        smallest = 3 * 2**self.layers
        if min(images.shape[1:3]) < smallest:
            raise ValueError(f"the discriminator needs images of {smallest} pixels a side or more")
        if self.norm not in NORMS:
            raise ValueError(f"discriminator norm {self.norm!r} is not one of {', '.join(NORMS)}")
        widths = [self.width * 2 ** min(i, 3) for i in range(self.layers + 1)]
        x = images.astype(self.dtype)
        for i, width in enumerate(widths):
            normed = i > 0 and self.norm != "none"
            axes = ("embed", "mlp") if i else (None, "embed")
            stride = 2 if i < self.layers else 1
            x = self._conv(width, stride, axes, use_bias=not normed, name=f"conv_{i}")(x)
            if normed:
                x = self._norm(width, name=f"norm_{i}")(x)
            x = jax.nn.leaky_relu(x, 0.2)
            x = constrain(x, "batch", None, None, "residual")
        logits = self._conv(1, 1, ("embed", None), use_bias=True, name="conv_out")(x)
        return logits.astype(jnp.float32)

    def _conv(self, width: int, stride: int, axes: Axes, *, use_bias: bool, name: str) -> nn.Conv:
        return nn.Conv(
            width,
            (4, 4),
            strides=stride,
            padding=((1, 1), (1, 1)),
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=partitioned(nn.initializers.normal(0.02), (None, None, *axes)),
            bias_init=partitioned(nn.initializers.zeros, axes[-1:]),
            name=name,
        )

    def _norm(self, width: int, name: str) -> nn.Module:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype, name=name)
        if self.norm == "rms_norm":
            return RMSNorm(EPSILON, use_bias=True, **types)
        return nn.GroupNorm(
            math.gcd(GROUPS, width),
            epsilon=EPSILON,
            scale_init=partitioned(nn.initializers.ones, ("embed",)),
            bias_init=partitioned(nn.initializers.zeros, ("embed",)),
            **types,
        )
