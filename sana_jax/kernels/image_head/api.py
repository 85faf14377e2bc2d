"""The end of the autoencoder's decoder: the plain form or a kernel."""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, use_image_kernel
from sana_jax.kernels.image_head import reference, tpu


def uses_kernel(
    shape: tuple[int, ...], features: int, dtype: DTypeLike, implementation: str
) -> bool:
    """Returns True if images of this shape get the kernel; `implementation`: see dispatch.py."""
    fits = tpu.rows_at_once(*shape[1:], features)
    return use_image_kernel(implementation, "image head", shape, dtype, fits)


@jax.custom_vjp
def image_head(
    x: Float[Array, "B H W C"],
    scale: Float[Array, " C"],
    shift: Float[Array, " C"],
    kernel: Float[Array, "3 3 C D"],
    bias: Float[Array, " D"],
) -> Float[Array, "B H W D"]:
    """Computes reference.image_head, by the kernel on a TPU; the gradient is the plain form's."""

    def run(*args):
        return by_platform(*args, tpu=tpu.forward, plain=reference.image_head)

    return over_mesh(run, (), (x,), (scale, shift, kernel, bias))


def _forward(*args):
    return image_head(*args), args


def _backward(args, cotangent):
    return jax.vjp(reference.image_head, *args)[1](cotangent)


image_head.defvjp(_forward, _backward)
