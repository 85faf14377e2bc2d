"""A residual block of the autoencoder: the plain form or a kernel."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, plain_gradient, use_image_kernel
from sana_jax.kernels.res_block import reference, tpu


def uses_kernel(shape: tuple[int, ...], dtype: DTypeLike, implementation: str) -> bool:
    """Returns True if images of this shape get the kernel; `implementation`: see dispatch.py."""
    fits = tpu.rows_at_once(*shape[1:])
    return use_image_kernel(implementation, "residual block", shape, dtype, fits)


@plain_gradient(reference.res_block)
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
