"""A residual block of the autoencoder: the plain form or a kernel."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, use_kernel
from sana_jax.kernels.res_block import reference, tpu


def uses_kernel(shape: tuple[int, ...], dtype: DTypeLike, implementation: str) -> bool:
    """Returns True if images of this shape get the kernel; `implementation`: see dispatch.py."""
    dtype = jnp.dtype(dtype)
    fits = dtype == jnp.bfloat16 and tpu.rows_at_once(*shape[1:])
    unsupported = None if fits else f"{dtype} images of {shape[1]} x {shape[2]} x {shape[3]}"
    return use_kernel(implementation, "residual block", dtype, tpu=unsupported, gpu="a GPU")


@jax.custom_vjp
def res_block(
    x: Float[Array, "B H W C"],
    kernel1: Float[Array, "3 3 C C"],
    bias1: Float[Array, " C"],
    kernel2: Float[Array, "3 3 C C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
) -> Float[Array, "B H W C"]:
    """Computes reference.res_block, by the kernel on a TPU; the gradient is the plain form's."""

    def block(*args):
        return by_platform(*args, tpu=tpu.forward, plain=reference.res_block)

    return over_mesh(block, (), (x,), (kernel1, bias1, kernel2, scale, bias))


def _forward(*args):
    return res_block(*args), args


def _backward(args, cotangent):
    return jax.vjp(reference.res_block, *args)[1](cotangent)


res_block.defvjp(_forward, _backward)
