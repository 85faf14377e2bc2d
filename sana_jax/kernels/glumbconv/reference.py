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
from jax.custom_derivatives import SymbolicZero, linear_call
from jaxtyping import Array, Float


@jax.custom_jvp
def depthwise_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K K C"]
) -> Float[Array, "B H W C"]:
    """Computes a depthwise K x K convolution (K odd, zero padding, stride 1) in float32.

    Written as K * K shifted multiply-adds: XLA's grouped convolution is 7 to 19 times slower on
    CPU. The transposed forms are its own: the kernel's gradient has another one on CPU.
    """
    return _multiply_add(x, kernel)


def _pad(x, shape):
    """Pads with zeros; the barrier keeps XLA from recomputing x for every shift."""
    radius = shape[0] // 2
    return lax.optimization_barrier(
        jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    )


def _multiply_add(x, kernel):
    height, width = x.shape[1:3]
    padded = _pad(x, kernel.shape)
    return sum(
        padded[:, p : p + height, q : q + width].astype(jnp.float32)
        * kernel[p, q].astype(jnp.float32)
        for p, q in np.ndindex(kernel.shape[:2])
    )


@partial(depthwise_conv.defjvp, symbolic_zeros=True)
def _tangent(primals, tangents):
    (x, kernel), (d_x, d_kernel), parts = primals, tangents, []
    if not isinstance(d_x, SymbolicZero):

        def of_x(kernel, dy):
            dy = lax.optimization_barrier(dy)  # as in _pad
            return _multiply_add(dy, jnp.flip(kernel, (0, 1))).astype(x.dtype)

        parts.append(linear_call(lambda k, d: _multiply_add(d, k), of_x, kernel, d_x))
    if not isinstance(d_kernel, SymbolicZero):
        of_kernel = partial(_kernel_gradient, kernel.shape, kernel.dtype)
        parts.append(linear_call(_multiply_add, of_kernel, x, d_kernel))
    return depthwise_conv(x, kernel), sum(parts)


def _kernel_gradient(shape, dtype, x, dy):
    dy = lax.optimization_barrier(dy)

    def usual(x, dy):
        kernel = jnp.zeros(shape, dtype)  # on which the gradient does not depend
        return jax.vjp(partial(_multiply_add, x), kernel)[1](dy)[0]

    def by_rows(x, dy):
        """Sums over one row of the images at a time, which takes a third of the time on CPU."""
        size, (height, width) = shape[0], x.shape[1:3]
        padded = _pad(x, shape).astype(jnp.float32)

        def add_row(y, sums):
            rows = lax.dynamic_slice_in_dim(padded, y, size, axis=1)
            dy_row = lax.dynamic_index_in_dim(dy, y, axis=1, keepdims=False)
            products = [
                jnp.sum(rows[:, p, q : q + width] * dy_row, axis=(0, 1))
                for p, q in np.ndindex(size, size)
            ]
            return sums + jnp.stack(products).reshape(sums.shape)

        sums = lax.fori_loop(0, height, add_row, jnp.zeros(shape, jnp.float32))
        return sums.astype(dtype)

    return lax.platform_dependent(x, dy, cpu=by_rows, default=usual)


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
