"""ReLU linear attention: the plain form or a kernel."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_batch, use_pallas
from sana_jax.kernels.linear_attention import gpu, reference, tpu


def linear_attention(
    qkv: Float[Array, "B N C3"],
    head_dim: int,
    epsilon: float = 1e-15,
    implementation: str = "auto",
) -> Float[Array, "B N C"]:
    """Attends every token to every other; reference.py says what is computed.

    `qkv` holds queries, keys and values side by side, heads side by side in each, as one
    projection leaves them. implementation: "auto", "xla" or "pallas", see kernels/dispatch.py.
    """
    channels = qkv.shape[-1] // 3
    unsupported = None
    if not tpu.supported(channels, head_dim):
        unsupported = f"heads of {head_dim} in {channels} channels"
    if use_pallas(implementation, "linear attention", unsupported):
        return over_batch(lambda qkv: _kernel(qkv, head_dim, epsilon), (qkv,))
    return _plain(qkv, head_dim, epsilon)


def _plain(qkv, head_dim, epsilon):
    parts = jnp.split(qkv, 3, axis=-1)
    q, k, v = (rearrange(t, "b n (h d) -> b n h d", d=head_dim) for t in parts)
    out = reference.linear_attention(q, k, v, epsilon)
    return rearrange(out, "b n h d -> b n (h d)")


def _kernels(head_dim):
    """The implementations that take `qkv`, by platform."""
    return {"tpu": tpu} | ({"cuda": gpu} if gpu.supported(head_dim) else {})


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _kernel(qkv, head_dim, epsilon):
    def run(module, qkv):
        return module.apply(qkv, module.state(qkv, head_dim), head_dim, epsilon)

    kernels = {name: partial(run, module) for name, module in _kernels(head_dim).items()}
    return by_platform(qkv, plain=lambda qkv: _plain(qkv, head_dim, epsilon), **kernels)


def _forward(qkv, head_dim, epsilon):
    return _kernel(qkv, head_dim, epsilon), qkv


def _backward(head_dim, epsilon, qkv, cotangent):
    def run(module, qkv, cotangent):
        state = module.state(qkv, head_dim)
        d_state = module.state_cotangent(qkv, state, cotangent, head_dim, epsilon)
        return module.cotangents(qkv, state, d_state, cotangent, head_dim, epsilon)

    def plain(qkv, cotangent):
        return jax.vjp(lambda qkv: _plain(qkv, head_dim, epsilon), qkv)[1](cotangent)[0]

    kernels = {name: partial(run, module) for name, module in _kernels(head_dim).items()}
    return (by_platform(qkv, cotangent, plain=plain, **kernels),)


_kernel.defvjp(_forward, _backward)
