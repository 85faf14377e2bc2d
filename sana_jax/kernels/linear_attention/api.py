"""ReLU linear attention: the plain form or a kernel."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, sequence_axis, use_kernel
from sana_jax.kernels.linear_attention import gpu, reference, tpu


def linear_attention(
    qkv: Float[Array, "B N C3"],
    head_dim: int,
    epsilon: float = reference.EPSILON,
    implementation: str = "auto",
) -> Float[Array, "B N C"]:
    """Attends every token to every other, as reference.py specifies it.

    `qkv` holds queries, keys and values side by side, and in each the heads side by side, as one
    projection leaves them. `implementation` is "auto", "xla" or "pallas", see kernels/dispatch.py.
    If a mesh splits the tokens, its devices sum the state between the two halves.
    """
    channels = qkv.shape[-1] // 3
    shape = f"heads of {head_dim} in {channels} channels"
    on_tpu = None if tpu.supported(channels, head_dim) else shape
    on_gpu = None if gpu.supported(head_dim) else shape
    kernel = use_kernel(implementation, "linear attention", qkv.dtype, tpu=on_tpu, gpu=on_gpu)
    form, axis = _kernel if kernel else _plain, sequence_axis(qkv.shape[1])
    return over_mesh(lambda qkv: form(qkv, head_dim, epsilon, axis), (qkv,), kernel=kernel)


def _plain(qkv, head_dim, epsilon, axis):
    parts = jnp.split(qkv, 3, axis=-1)
    q, k, v = (rearrange(t, "b n (h d) -> b n h d", d=head_dim) for t in parts)
    out = reference.linear_attention(q, k, v, epsilon, axis)
    return rearrange(out, "b n h d -> b n (h d)")


def _kernels(head_dim):
    """Returns the modules with kernels, by platform."""
    return {"tpu": tpu} | ({"cuda": gpu} if gpu.supported(head_dim) else {})


def _total(state, axis):
    """Sums a state, or its cotangent, over the devices that share an image's tokens."""
    return jax.lax.psum(state, axis) if axis else state


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _kernel(qkv, head_dim, epsilon, axis):
    def run(module, qkv):
        state = _total(module.state(qkv, head_dim), axis)
        return module.apply(qkv, state, head_dim, epsilon)

    kernels = {name: partial(run, module) for name, module in _kernels(head_dim).items()}
    return by_platform(qkv, plain=lambda qkv: _plain(qkv, head_dim, epsilon, axis), **kernels)


def _forward(qkv, head_dim, epsilon, axis):
    return _kernel(qkv, head_dim, epsilon, axis), qkv


def _backward(head_dim, epsilon, axis, qkv, cotangent):
    def run(module, qkv, cotangent):
        state = _total(module.state(qkv, head_dim), axis)
        d_state = module.state_cotangent(qkv, state, cotangent, head_dim, epsilon)
        return module.cotangents(qkv, state, _total(d_state, axis), cotangent, head_dim, epsilon)

    def plain(qkv, cotangent):
        return jax.vjp(lambda qkv: _plain(qkv, head_dim, epsilon, axis), qkv)[1](cotangent)[0]

    kernels = {name: partial(run, module) for name, module in _kernels(head_dim).items()}
    return (by_platform(qkv, cotangent, plain=plain, **kernels),)


_kernel.defvjp(_forward, _backward)
