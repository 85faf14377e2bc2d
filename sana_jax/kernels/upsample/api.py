"""The decoder's change of resolution: the plain form or a kernel."""

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, plain_gradient, use_image_kernel
from sana_jax.kernels.upsample import reference, tpu


def uses_kernel(
    shape: tuple[int, ...], features: int, dtype: DTypeLike, implementation: str
) -> bool:
    """Returns True if images of this shape get the kernel; `implementation`: see dispatch.py."""
    fits = tpu.rows_at_once(*shape[1:], features)
    return use_image_kernel(implementation, "upsampling", shape, dtype, fits)


@plain_gradient(reference.upsample)
def upsample(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], bias: Float[Array, " D"]
) -> Float[Array, "B 2*H 2*W D"]:
    """Computes reference.upsample, by the kernel on a TPU; the gradient is the plain form's."""

    def run(*args):
        return by_platform(*args, tpu=tpu.forward, plain=reference.upsample)

    return over_mesh(run, (), (x,), (kernel, bias))
