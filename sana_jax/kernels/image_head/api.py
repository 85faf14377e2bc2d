"""The end of the autoencoder's decoder: the plain form or a kernel."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, plain_gradient, use_image_kernel
from sana_jax.kernels.image_head import reference, tpu


def uses_kernel(
    shape: tuple[int, ...], features: int, dtype: DTypeLike, implementation: str
) -> bool:
    """Returns True if images of this shape get the kernel; `implementation`: see dispatch.py."""
    fits = tpu.rows_at_once(*shape[1:], features)
    return use_image_kernel(implementation, "image head", shape, dtype, fits)


@plain_gradient(reference.image_head)
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
