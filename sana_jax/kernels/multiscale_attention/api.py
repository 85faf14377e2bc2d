"""Multi-scale attention: the plain form or a kernel."""

from functools import partial

import jax
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, use_image_kernel
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
    weights = tuple(jax.tree.leaves(scales))
    return over_mesh(lambda qkv, *weights: _kernel(head_dim, qkv, *weights), (), (qkv,), weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel(head_dim, qkv, *weights):
    """Computes it by the kernel on a TPU; the gradient is the plain form's."""

    def on_tpu(qkv, *weights):
        return tpu.forward(qkv, _pairs(weights), head_dim)

    return by_platform(qkv, *weights, tpu=on_tpu, plain=partial(_plain, head_dim))


def _pairs(weights):
    return tuple(zip(weights[::2], weights[1::2], strict=True))


def _plain(head_dim, qkv, *weights):
    return reference.multiscale_attention(qkv, _pairs(weights), head_dim)


def _forward(head_dim, *args):
    return _kernel(head_dim, *args), args


def _backward(head_dim, args, cotangent):
    return jax.vjp(partial(_plain, head_dim), *args)[1](cotangent)


_kernel.defvjp(_forward, _backward)
