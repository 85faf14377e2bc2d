"""The middle of Mix-FFN: the plain form or a kernel."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_batch, use_pallas
from sana_jax.kernels.glumbconv import gpu, reference, tpu


def glumbconv(
    value: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    bias: Float[Array, " C2"],
    depthwise_kernel: Float[Array, "3 3 C2"],
    depthwise_bias: Float[Array, " C2"],
    implementation: str = "auto",
) -> Float[Array, "B H W C"]:
    """Bias, SiLU, depthwise 3x3, bias, gate; reference.py says what is computed.

    Value and gate are the two halves of the wide tensor, C2 = 2 C: as two arrays, each from a
    product of its own, they need no copy. implementation: see kernels/dispatch.py.
    """
    weights = (bias, depthwise_kernel, depthwise_bias)
    if uses_kernel(*value.shape[1:3], implementation):
        return over_batch(_kernel, (value, gate), weights)
    return _plain(value, gate, *weights)


def uses_kernel(height: int, width: int, implementation: str) -> bool:
    """Whether images of this size get the kernel, to which two products are better than one."""
    unsupported = None if tpu.supported(height, width) else f"images of {height} x {width}"
    return use_pallas(implementation, "glumbconv", unsupported)


def _plain(value, gate, *weights):
    return reference.glumbconv(jnp.concatenate([value, gate], axis=-1), *weights)


def _by_halves(bias, kernel, depthwise_bias):
    """Weights as the kernel takes them: (2, C), (9, 2, C), (2, C)."""
    return bias.reshape(2, -1), kernel.reshape(9, 2, -1), depthwise_bias.reshape(2, -1)


@jax.custom_vjp
def _kernel(value, gate, *weights):
    def run(module, value, gate, *weights):
        return module.forward(value, gate, *_by_halves(*weights))

    kernels = dict(tpu=partial(run, tpu), cuda=partial(run, gpu))
    return by_platform(value, gate, *weights, plain=_plain, **kernels)


def _forward(*args):
    return _kernel(*args), args


def _backward(args, cotangent):
    def run(module, value, gate, *rest):
        *weights, cotangent = rest
        d_value, d_gate, *d_weights = module.backward(value, gate, *_by_halves(*weights), cotangent)
        pairs = zip(d_weights, weights, strict=True)
        return d_value, d_gate, *(d.reshape(w.shape).astype(w.dtype) for d, w in pairs)

    def plain(*args):
        return jax.vjp(_plain, *args[:-1])[1](args[-1])

    kernels = dict(tpu=partial(run, tpu), cuda=partial(run, gpu))
    return by_platform(*args, cotangent, plain=plain, **kernels)


_kernel.defvjp(_forward, _backward)
