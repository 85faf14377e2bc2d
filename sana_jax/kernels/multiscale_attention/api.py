"""Multi-scale attention: the plain form or a kernel."""

from functools import partial

from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, plain_gradient, use_image_kernel
from sana_jax.kernels.multiscale_attention import reference, tpu
from sana_jax.kernels.multiscale_attention.reference import Scale


def multiscale_attention(
    qkv: Float[Array, "B H W C3"],
    scales: tuple[Scale, ...],
    head_dim: int,
    implementation: str = "auto",
) -> Float[Array, "B H W C"]:
    """Attends every pixel to every other, and again at every scale, as reference.py specifies it.

    C is the channels of all heads of all scales. `implementation`: see kernels/dispatch.py.
    """
    sizes = tuple(len(depthwise) for depthwise, _ in scales)
    fits = tpu.supported(*qkv.shape[1:], head_dim, sizes)
    about = "multi-scale attention", qkv.shape, qkv.dtype
    if not use_image_kernel(implementation, *about, fits):
        return reference.multiscale_attention(qkv, scales, head_dim)
    plain = partial(reference.multiscale_attention, head_dim=head_dim)

    @plain_gradient(plain)
    def run(qkv, scales):
        on_tpu = partial(tpu.forward, head_dim=head_dim)
        return by_platform(qkv, scales, tpu=on_tpu, plain=plain)

    return over_mesh(run, (), (qkv,), (scales,))
