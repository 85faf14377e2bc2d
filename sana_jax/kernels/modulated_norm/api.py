"""Modulated layer norm: the plain form or a kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, use_kernel
from sana_jax.kernels.modulated_norm import reference, tpu


def modulated_norm(
    x: Float[Array, "B N C"],
    shift: Float[Array, "#B 1 C"],
    scale: Float[Array, "#B 1 C"],
    implementation: str = "auto",
) -> tuple[Float[Array, "B N C"], Float[Array, "B N C"]]:
    """Returns x, and LN(x) (1 + scale) + shift as reference.py specifies it.

    Use the returned x for the residual: the kernel's backward pass then adds the cotangents of
    both uses while they are in VMEM.
    """
    if use_kernel(implementation, "modulated norm", x.dtype, tpu=None, gpu="a GPU"):
        shape = (x.shape[0], 1, x.shape[-1])
        vectors = (jnp.broadcast_to(v.astype(jnp.float32), shape) for v in (shift, scale))
        return over_mesh(_kernel, (x,), tuple(vectors))
    return x, reference.modulated_norm(x, shift, scale)


@jax.custom_vjp
def _kernel(x, shift, scale):
    plain = reference.modulated_norm
    return x, by_platform(x, shift, scale, tpu=tpu.forward, plain=plain)


def _forward(x, shift, scale):
    return _kernel(x, shift, scale), (x, shift, scale)


def _backward(saved, cotangents):
    residual, cotangent = cotangents

    def on_tpu(x, shift, scale, residual, cotangent):
        return tuple(tpu.backward(x, cotangent, residual, scale))

    def plain(x, shift, scale, residual, cotangent):
        d_x, *rest = jax.vjp(reference.modulated_norm, x, shift, scale)[1](cotangent)
        return d_x + residual, *rest

    return by_platform(*saved, residual, cotangent, tpu=on_tpu, plain=plain)


_kernel.defvjp(_forward, _backward)
