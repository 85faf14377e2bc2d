"""Layers that at least two of the networks share.

Every weight names its logical axes (sharding.py maps them to the mesh). `dtype` is what a layer
computes in, `param_dtype` what its weights are stored in.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels.convolution import convolve, convolve_doubled
from sana_jax.kernels.glumbconv import reference
from sana_jax.kernels.glumbconv.api import glumbconv, uses_kernel
from sana_jax.kernels.mixed_einsum import dense_float32

Dtype = Any
Axes = tuple[str | None, ...]

xavier = nn.initializers.xavier_uniform()
# What torch's convolutions start from: uniform in +-1/sqrt(fan_in).
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def partitioned(init: nn.initializers.Initializer, axes: Axes) -> nn.initializers.Initializer:
    """`init`, with the logical axis names of the weight it makes."""
    return nn.with_logical_partitioning(init, axes)


def dense(
    features: int,
    axes: Axes,
    *,
    use_bias: bool = True,
    kernel_init: nn.initializers.Initializer = xavier,
    dtype: Dtype,
    param_dtype: Dtype,
    precision: jax.lax.Precision | None = None,
    name: str | None = None,
) -> nn.Dense:
    """A matrix product with logical axes (in, out)."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        kernel_init=partitioned(kernel_init, axes),
        bias_init=partitioned(nn.initializers.zeros, axes[-1:]),
        dot_general=dense_float32,
        name=name,
    )


class Conv3x3(nn.Module):
    """A 3x3 convolution, one row of zeros on every side; logical axes (in, out).

    `double`: of x at twice its size, nearest neighbour.
    """

    features: int
    axes: Axes = (None, None)
    stride: int = 1
    double: bool = False
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        kernel_init = partitioned(fan_in_uniform, (None, None, *self.axes))
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        x = x.astype(self.dtype)
        if self.double:
            y = convolve_doubled(x, kernel)
        else:
            y = convolve(x, kernel.astype(self.dtype), self.stride)
        if self.use_bias:
            bias_init = partitioned(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale (+ bias) over the last axis, in float32.

    `zero_centered`: the stored scale is an offset from one, as in Gemma.
    """

    epsilon: float
    use_bias: bool = False
    zero_centered: bool = False
    scale_init: float = 1.0
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        width = (x.shape[-1],)
        start = 0.0 if self.zero_centered else self.scale_init
        scale_init = partitioned(nn.initializers.constant(start), ("embed",))
        scale = self.param("scale", scale_init, width, self.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        x = x * (1.0 + scale if self.zero_centered else scale)
        if self.use_bias:
            bias_init = partitioned(nn.initializers.zeros, ("embed",))
            x = x + self.param("bias", bias_init, width, self.param_dtype).astype(jnp.float32)
        return x.astype(self.dtype)


class Halves(nn.Module):
    """A matrix product without bias, as one product or as two that give its halves."""

    features: int
    axes: Axes
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"], parts: int) -> list[Array]:
        init = partitioned(fan_in_uniform, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        kernels = jnp.split(kernel.astype(self.dtype), parts, axis=1)
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        return [dense_float32(x.astype(self.dtype), kernel, dims, None) for kernel in kernels]


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 up to 2h channels, gated depthwise 3x3, 1x1 back; no norm, no residual.

    SANA (arXiv 2410.10629, section 2.3); the middle is kernels/glumbconv.
    """

    hidden: int  # h
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"  # of the middle: see kernels/dispatch.py

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        wide = 2 * self.hidden

        def vector(name):
            init = partitioned(nn.initializers.zeros, ("mlp",))
            return self.param(name, init, (wide,), self.param_dtype)

        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1))
        depthwise_kernel = self.param(
            "depthwise_kernel",
            partitioned(kernel_init, (None, None, "mlp")),
            (3, 3, wide),
            self.param_dtype,
        )
        axes = ("embed", "mlp")
        weights = vector("expand_bias"), depthwise_kernel, vector("depthwise_bias")
        expand = Halves(wide, axes, name="expand", **types)
        if uses_kernel(*x.shape[1:3], self.implementation):
            u = glumbconv(*expand(x, 2), *weights, implementation=self.implementation)
        else:
            u = reference.glumbconv(*expand(x, 1), *weights)
        return dense(
            x.shape[-1],
            axes[::-1],
            use_bias=False,
            kernel_init=fan_in_uniform,
            name="contract",
            **types,
        )(u)
