"""Layers that at least two of the networks share.

Every weight names its logical axes (sharding.py maps them to the mesh). A layer computes in `dtype`
and stores its weights in `param_dtype`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sana_jax.kernels.bias import add_bias
from sana_jax.kernels.convolution import convolve, convolve_doubled
from sana_jax.kernels.glumbconv import glumbconv
from sana_jax.kernels.int8 import Quantised, Weight, join, layer_of, multiply, part
from sana_jax.kernels.mixed_einsum import dense_float32

Dtype = Any
Axes = tuple[str | None, ...]

xavier = nn.initializers.xavier_uniform()
# The initial weights of torch's convolutions: uniform in +-1/sqrt(fan_in), of variance
# 1 / (3 fan_in).
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def partitioned(init: nn.initializers.Initializer, axes: Axes) -> nn.initializers.Initializer:
    """Returns `init` with the logical axis names of its weight."""
    return nn.with_logical_partitioning(init, axes)


Kernel = Float[Array, "*L C D"] | Weight


def merged(kernel: Kernel, lora: dict[str, Array]) -> Float[Array, "*L C D"]:
    """Returns kernel + a b of a low-rank update, with float32 sums.

    It is in the kernel's dtype, or of a quantised kernel in float32.
    """
    a, b = (lora[name].astype(jnp.float32) for name in "ab")
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    total = kernel.astype(jnp.float32) + update
    return total if isinstance(kernel, Quantised) else total.astype(kernel.dtype)


class Dense(nn.Module):
    """A matrix product with float32 sums, and a bias; see `dense`.

    The kernel in its parameters may be quantised (kernels/int8), and have a low-rank update beside
    it, "lora", with which it computes x kernel + (x a) b: lora/adapter.py puts it there.
    """

    features: int
    use_bias: bool
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer
    dtype: Dtype
    param_dtype: Dtype
    precision: jax.lax.Precision | None

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B D"]:
        kernel, bias = self._weights(x.shape[-1])
        x = x.astype(self.dtype)
        y = multiply(x, kernel, self.precision)
        if self.has_variable("params", "lora"):
            y = y + self._low_rank(x, self.get_variable("params", "lora"))
        return y if bias is None else add_bias(y, bias.astype(self.dtype))

    def weights(self, channels: int) -> tuple[Kernel, Float[Array, " D"] | None]:
        """Returns the kernel for `channels`, and the bias or None, in `param_dtype`.

        For operations that compute this layer's product themselves; a low-rank update is in it.
        """
        kernel, bias = self._weights(channels)
        if self.has_variable("params", "lora"):
            kernel = merged(kernel, self.get_variable("params", "lora"))
        return kernel, bias

    def _low_rank(self, x: Float[Array, "*B C"], lora: dict[str, Array]) -> Float[Array, "*B D"]:
        if "keep" in lora and self.has_rng("dropout"):
            kept = jax.random.bernoulli(self.make_rng("dropout"), lora["keep"], x.shape)
            x = jnp.where(kept, x / lora["keep"], 0).astype(x.dtype)
        for name in "ab":
            x = dense_float32(x, lora[name].astype(self.dtype), self.precision)
        return x

    @nn.compact
    def _weights(self, channels: int) -> tuple[Kernel, Float[Array, " D"] | None]:
        shape = (channels, self.features)
        kernel = self.get_variable("params", "kernel")
        # Flax would compare the shape of all layers with this one's.
        if not (isinstance(kernel, Quantised) and kernel.layer is not None):
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, shape[1:], self.param_dtype)


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
) -> Dense:
    """Returns a matrix product with logical axes (in, out)."""
    return Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        kernel_init=partitioned(kernel_init, axes),
        bias_init=partitioned(nn.initializers.zeros, axes[-1:]),
        name=name,
    )


FIRST_LAYER = "0000"
IN_PLACE = "in_place"


def unstack(stack: Any) -> dict[str, Any]:
    """Returns a tree of stacked arrays as {name of a layer: its tree}, in order.

    Scanned layers copy their weights out of the stack whenever they run. A caller that runs them
    often, in a loop, takes them apart once before it: see `scan_for_sampling`.
    """
    stack = nn.unbox(stack)
    depth = jax.tree.leaves(stack)[0].shape[0]
    # JAX sorts the keys of a dict.
    return {f"{i:04}": layer_of(stack, i) for i in range(depth)}


def scan_for_sampling(
    scanned: nn.Module,
    layer: nn.Module,
    method: str,
    carry: Any,
    each: tuple,
    *shared: Any,
    layers: slice = slice(None),
) -> tuple[Any, Any]:
    """Runs `method` of `scanned`, an nn.scan of `layer`, if the weights need no gradient.

    Each layer gets its own row of `each`, and all get `shared`; `layers` says which layers run, and
    each of them has a row. XLA's CPU backend slices bfloat16
    as float32, and moves the widening of the whole stack of weights out of an nn.scan: three times
    the memory, and slower. A barrier makes the stack seem to depend on the layer's number, which
    keeps the widening of a slice inside the loop.

    Weights and `each` that `unstack` has taken apart are used without a loop. What int8.part gave
    to stay whole is beside them as IN_PLACE.
    """
    if scanned.is_initializing():
        return getattr(scanned, method)(carry, *each, *shared)
    stack = nn.unbox(scanned.variables["params"])
    if FIRST_LAYER in stack:
        results, values = [], stack.pop(IN_PLACE, None)
        for name, params in list(stack.items())[layers]:
            own = (rows[name] for rows in each)
            params = params if values is None else join(params, values)
            carry, result = layer.apply({"params": params}, carry, *own, *shared, method=method)
            results.append(result)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)

    def in_loop(*own):
        return jax.lax.optimization_barrier(own)

    parted = part(stack)

    def body(carry, row):
        i, each = row
        own = jax.lax.platform_dependent(parted, i, cpu=in_loop, default=lambda *own: own)
        (rest, values), i = own
        params = join(layer_of(rest, i), values)
        return layer.apply({"params": params}, carry, *each, *shared, method=method)

    depth = jax.tree.leaves(stack)[0].shape[0]
    return jax.lax.scan(body, carry, (jnp.arange(depth)[layers], each))


class Embed(nn.Module):
    """A table of rows to look up; the table may be quantised, with a scale for each row."""

    count: int
    features: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B C"]:
        """Returns the rows in `param_dtype`."""
        init = partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (self.count, self.features), self.param_dtype)
        rows = jax.tree.map(lambda x: jnp.take(x, tokens, axis=0), table)
        return rows.astype(self.param_dtype)


class Conv3x3(nn.Module):
    """A 3x3 convolution, padded by one row of zeros on every side; logical axes (in, out).

    Of a quantised kernel the product is in float: only memory is saved.
    `double` convolves x at twice its size, nearest neighbour.
    """

    features: int
    axes: Axes = (None, None)
    stride: int = 1
    double: bool = False
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        kernel, bias = self.weights(x.shape[-1])
        x = x.astype(self.dtype)
        if self.double:
            y = convolve_doubled(x, kernel)
        else:
            y = convolve(x, kernel.astype(self.dtype), self.stride)
        return y if bias is None else y + bias.astype(self.dtype)

    @nn.compact
    def weights(self, channels: int) -> tuple[Float[Array, "3 3 C D"], Float[Array, " D"] | None]:
        """Returns the kernel for `channels`, and the bias or None, in `param_dtype`.

        For operations that compute this layer themselves.
        """
        kernel_init = partitioned(fan_in_uniform, (None, None, *self.axes))
        shape = (3, 3, channels, self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
        kernel = kernel.astype(self.param_dtype)  # it may be quantised
        if not self.use_bias:
            return kernel, None
        bias_init = partitioned(nn.initializers.zeros, self.axes[1:])
        return kernel, self.param("bias", bias_init, shape[3:], self.param_dtype)


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


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 up to 2h channels, gated depthwise 3x3, 1x1 back; no norm, no residual.

    SANA (arXiv 2410.10629, section 2.3), by kernels/glumbconv.
    """

    hidden: int  # h
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"  # see kernels/dispatch.py
    split_rows: bool = False  # over the mesh axis that splits tokens

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], scale: Float[Array, "#B #H #W C"] | None = None
    ) -> Float[Array, "B H W C"]:
        """Returns the result, times `scale` in float32 if given."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        wide = 2 * self.hidden

        def vector(name):
            init = partitioned(nn.initializers.zeros, ("mlp",))
            return self.param(name, init, (wide,), self.param_dtype)

        # As fan_in_uniform; the fan-in of a depthwise kernel is its nine taps.
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1))
        depthwise_kernel = self.param(
            "depthwise_kernel",
            partitioned(kernel_init, (None, None, "mlp")),
            (3, 3, wide),
            self.param_dtype,
        )
        weights = vector("expand_bias"), depthwise_kernel, vector("depthwise_bias")
        linear = dict(use_bias=False, kernel_init=fan_in_uniform, **types)
        expand = dense(wide, ("embed", "mlp"), name="expand", **linear)
        contract = dense(x.shape[-1], ("mlp", "embed"), name="contract", **linear)
        return glumbconv(
            x.astype(self.dtype),
            expand.weights(x.shape[-1])[0],
            weights,
            contract.weights(self.hidden)[0],
            scale,
            split_rows=self.split_rows,
            implementation=self.implementation,
        )
