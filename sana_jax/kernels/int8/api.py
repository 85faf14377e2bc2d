"""A product with weights of any kind, and its gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from sana_jax.kernels.int8 import reference
from sana_jax.kernels.int8.weights import Quantised, Simulated, Watched, Weight
from sana_jax.kernels.mixed_einsum import dense_float32


def multiply(
    x: Float[Array, "*B C"],
    kernel: Float[Array, "C D"] | Weight,
    precision: lax.Precision | None = None,
) -> Float[Array, "*B D"]:
    """Returns x times kernel in x's dtype with float32 sums, or by int8 as reference.py says.

    Gradients are straight-through. Beside quantised weights, which have none, they are those of the
    product of what the integers stand for; of what is simulated, those of the product as if nothing
    had been rounded, and its largest number also gets that of the scale that it sets.
    """
    if isinstance(kernel, Quantised):
        kernel = kernel.alone()
        if kernel.rows == "int8":
            return _product(x, kernel)
        return reference.product_of_weights(x, kernel.values, kernel.scale, precision)
    if isinstance(kernel, Simulated):
        return _simulated(x, kernel.kernel, kernel.products)
    if isinstance(kernel, Watched):
        kernel = kernel.watch(x)
    return dense_float32(x, kernel.astype(x.dtype), precision)


@jax.custom_vjp
def _product(x: Float[Array, "*B C"], kernel: Quantised) -> Float[Array, "*B D"]:
    return reference.product(x, kernel.values, kernel.scale, kernel.range)


def _forward(x, kernel):
    return _product(x, kernel), kernel


def _backward(kernel, cotangent):
    scaled = (cotangent.astype(jnp.float32) * kernel.scale[0]).astype(cotangent.dtype)
    d_x = dense_float32(scaled, kernel.values.T.astype(cotangent.dtype))
    return d_x, jax.tree.map(_no_gradient, kernel)


def _no_gradient(x: Array) -> Array | np.ndarray:
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    return np.zeros(x.shape, jax.dtypes.float0) if whole else jnp.zeros_like(x)


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _simulated(
    x: Float[Array, "*B C"], kernel: Float[Array, "C D"], products: frozenset[str]
) -> Float[Array, "*B D"]:
    return _either(x, kernel, "forward" in products)


def _either(x: Float[Array, "*B C"], kernel: Float[Array, "C D"], int8: bool) -> Array:
    """Returns x times kernel in x's dtype; in int8 both are rounded along the sum."""
    if not int8:
        return dense_float32(x, kernel.astype(x.dtype))
    scale = reference.scale_of(kernel, 0)
    return reference.product(x, reference.values_of(kernel, scale), scale)


def _simulated_forward(x, kernel, products):
    return _simulated(x, kernel, products), (x, kernel)


def _simulated_backward(products, saved, cotangent):
    x, kernel = saved
    d_x = _either(cotangent, kernel.T, "rows" in products)
    rows, of_rows = (t.reshape(-1, t.shape[-1]) for t in (x, cotangent))
    d_kernel = _either(rows.T, of_rows, "weights" in products).astype(kernel.dtype)
    if "forward" in products:
        d_x, d_kernel = _of_scale(x, d_x, -1), _of_scale(kernel, d_kernel, 0)
    return d_x, d_kernel


def _of_scale(x: Array, cotangent: Array, axis: int) -> Array:
    """Adds the gradient by way of the scale to that of what x is rounded to.

    x is rounded to scale * round(x / scale), whose derivative by the scale is, straight-through,
    round(x / scale) - x / scale (LSQ, arXiv 1902.08153, equation 3). A range that is too large for
    most of a row then shrinks.
    """
    # By its place and not its value: XLA may compute x twice, with different last bits.
    place = jnp.argmax(jnp.abs(x), axis, keepdims=True)
    steps = x.astype(jnp.float32) / jnp.maximum(reference.scale_of(x, axis), reference.TINY)
    by_scale = jnp.sum(cotangent * (jnp.round(steps) - steps), axis, keepdims=True)
    is_largest = lax.broadcasted_iota(place.dtype, x.shape, axis % x.ndim) == place
    added = jnp.where(is_largest, jnp.sign(x) * by_scale / reference.LARGEST, 0)
    return cotangent + added.astype(cotangent.dtype)


_simulated.defvjp(_simulated_forward, _simulated_backward)
