"""The middle of Mix-FFN in plain jnp: the specification of the kernel.

    u = silu(x + bias)                          point-wise, all 2h channels
    [a, g] = depthwise3x3(u) + depthwise_bias   zero padding
    out = a * silu(g)                           the gate is the second half

SANA (arXiv 2410.10629, section 2.3). The matrix products before and after it are not part of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C"]
) -> Float[Array, "B H W C"]:
    """Computes a depthwise K x K convolution (K odd, zero padding, stride 1) in float32.

    Written as K * K shifted multiply-adds: XLA's grouped convolution is 7 to 19 times slower on
    CPU. Supports reverse-mode derivatives only: the kernel's gradient has its own form on CPU.
    """
    return _multiply_add(x, kernel)


def _pad(x, kernel):
    """Pads with zeros; the barrier keeps XLA from recomputing x for every shift."""
    radius = kernel.shape[0] // 2
    return lax.optimization_barrier(
        jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    )


def _multiply_add(x, kernel):
    height, width = x.shape[1:3]
    padded = _pad(x, kernel)
    return sum(
        padded[:, p : p + height, q : q + width].astype(jnp.float32)
        * kernel[p, q].astype(jnp.float32)
        for p, q in np.ndindex(kernel.shape[:2])
    )


def _forward(x, kernel):
    return _multiply_add(x, kernel), (x, kernel)


def _backward(residuals, dy):
    x, kernel = residuals
    dy = lax.optimization_barrier(dy)  # as in _pad

    def usual(x, kernel, dy):
        return jax.vjp(partial(_multiply_add, x), kernel)[1](dy)[0]

    def by_rows(x, kernel, dy):
        """Sums over one row of the images at a time, which takes a third of the time on CPU."""
        size, (height, width) = kernel.shape[0], x.shape[1:3]
        padded = _pad(x, kernel).astype(jnp.float32)

        def add_row(y, sums):
            rows = lax.dynamic_slice_in_dim(padded, y, size, axis=1)
            dy_row = lax.dynamic_index_in_dim(dy, y, axis=1, keepdims=False)
            products = [
                jnp.sum(rows[:, p, q : q + width] * dy_row, axis=(0, 1))
                for p, q in np.ndindex(size, size)
            ]
            return sums + jnp.stack(products).reshape(sums.shape)

        sums = lax.fori_loop(0, height, add_row, jnp.zeros(kernel.shape, jnp.float32))
        return sums.astype(kernel.dtype)

    dx = _multiply_add(dy, jnp.flip(kernel, (0, 1))).astype(x.dtype)
    return dx, lax.platform_dependent(x, kernel, dy, cpu=by_rows, default=usual)


depthwise_conv.defvjp(_forward, _backward)


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
