"""Attention from tokens to text rows: the plain form or a kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.cross_attention import gpu, reference, tpu
from sana_jax.kernels.dispatch import by_platform, over_mesh, platform, use_kernel


def cross_attention(
    q: Float[Array, "B N C"],
    kv: Float[Array, "B L C2"] | tuple[Float[Array, "B L C"], Float[Array, "B L C"]],
    mask: Bool[Array, "B L"],
    heads: int,
    implementation: str = "auto",
) -> Float[Array, "B N C"]:
    """Computes softmax attention from every token to the text rows, as reference.py does.

    On a GPU the rows that `mask` hides must stand behind all others, see `visible_first`, and keys
    and values may be a pair: there it costs a copy to cut them apart.
    """
    on_tpu = on_gpu = None
    if not tpu.supported(mask.shape[1], q.shape[2]):
        on_tpu = f"{mask.shape[1]} text rows"
    elif q.dtype == jnp.float32:  # the kernel is off by 1e-4 there, too much for float32
        on_tpu = "float32"
    if platform() == "gpu":
        on_gpu = gpu.unsupported(q, kv, mask, heads)
    if use_kernel(implementation, "cross attention", q.dtype, tpu=on_tpu, gpu=on_gpu):
        return over_mesh(lambda *args: _kernel(*args, heads), (q,), (kv, mask))
    return reference.cross_attention(q, kv, mask, heads)


def visible_first(
    rows: Float[Array, "*B L C"], mask: Bool[Array, "*B L"]
) -> tuple[Float[Array, "*B L C"], Bool[Array, "*B L"]]:
    """Moves the rows that the mask hides behind the others, whose order stays; and the mask's.

    The sum over rows does not know their order. Prompts come like this from text/prompts.py.
    """
    order = jnp.argsort(~mask, axis=-1, stable=True)
    rows = jnp.take_along_axis(rows, order[..., None], axis=-2)
    return rows, jnp.take_along_axis(mask, order, axis=-1)


def hidden_bias(mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Returns what is added to the logits of text rows, for the kernel."""
    return jnp.where(mask, 0.0, reference.HIDDEN)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _kernel(q, kv, mask, heads):
    def on_tpu(q, kv, mask):
        return tpu.forward(q, kv, hidden_bias(mask), heads)

    plain = partial(reference.cross_attention, heads=heads)
    return by_platform(
        q, kv, mask, plain=plain, **_kernels(on_tpu, partial(gpu.forward, heads=heads))
    )


def _kernels(on_tpu, on_gpu):
    """Returns the kernel that can be traced here: JAX traces cuDNN's only where there is one."""
    return {"cuda": on_gpu} if platform() == "gpu" else {"tpu": on_tpu}


def _forward(q, kv, mask, heads):
    return _kernel(q, kv, mask, heads), (q, kv, mask)


def _backward(heads, saved, cotangent):
    def on_tpu(q, kv, mask, cotangent):
        return tpu.backward(q, kv, hidden_bias(mask), cotangent, heads)

    def pull_back(form, q, kv, mask, cotangent):
        return jax.vjp(lambda q, kv: form(q, kv, mask, heads), q, kv)[1](cotangent)

    plain = partial(pull_back, reference.cross_attention)
    kernels = _kernels(on_tpu, partial(pull_back, gpu.forward))
    d_q, d_kv = by_platform(*saved, cotangent, plain=plain, **kernels)
    return d_q, d_kv, np.zeros(saved[2].shape, jax.dtypes.float0)


_kernel.defvjp(_forward, _backward)
