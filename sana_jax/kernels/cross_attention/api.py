"""Attention from tokens to text rows: the plain form or a kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.cross_attention import reference, tpu
from sana_jax.kernels.dispatch import by_platform, over_mesh, use_pallas


def cross_attention(
    q: Float[Array, "B N C"],
    kv: Float[Array, "B L C2"],
    mask: Bool[Array, "B L"],
    heads: int,
    implementation: str = "auto",
) -> Float[Array, "B N C"]:
    """Computes softmax attention from every token to the text rows, as reference.py does."""
    unsupported = None
    if not tpu.supported(kv.shape[1]):
        unsupported = f"{kv.shape[1]} text rows"
    elif q.dtype == jnp.float32:  # the kernel is off by 1e-4 there, too much for float32
        unsupported = "float32"
    if use_pallas(implementation, "cross attention", q.dtype, unsupported):
        return over_mesh(lambda *args: _kernel(*args, heads), (q,), (kv, mask))
    return reference.cross_attention(q, kv, mask, heads)


def _bias(mask):
    return jnp.where(mask, 0.0, reference.HIDDEN)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernel(q, kv, mask, heads):
    def on_tpu(q, kv, mask):
        return tpu.forward(q, kv, _bias(mask), heads)

    plain = partial(reference.cross_attention, heads=heads)
    return by_platform(q, kv, mask, tpu=on_tpu, plain=plain)


def _forward(q, kv, mask, heads):
    return _kernel(q, kv, mask, heads), (q, kv, mask)


def _backward(heads, saved, cotangent):
    def on_tpu(q, kv, mask, cotangent):
        d_q, d_kv = tpu.backward(q, kv, _bias(mask), cotangent, heads)
        return d_q, d_kv.astype(kv.dtype)

    def plain(q, kv, mask, cotangent):
        return jax.vjp(lambda q, kv: reference.cross_attention(q, kv, mask, heads), q, kv)[1](
            cotangent
        )

    d_q, d_kv = by_platform(*saved, cotangent, tpu=on_tpu, plain=plain)
    return d_q, d_kv, np.zeros(saved[2].shape, jax.dtypes.float0)


_kernel.defvjp(_forward, _backward)
