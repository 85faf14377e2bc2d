"""The middle of Mix-FFN: the plain form or a kernel, on all rows of the images or on some."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import by_platform, over_mesh, sequence_axis, use_pallas
from sana_jax.kernels.glumbconv import gpu, reference, tpu

OUTSIDE = -1e4  # what SiLU turns into zero, after any bias, and whose cotangent it turns into zero


def glumbconv(
    halves: Sequence[Float[Array, "B H W _"]],
    bias: Float[Array, " C2"],
    depthwise_kernel: Float[Array, "3 3 C2"],
    depthwise_bias: Float[Array, " C2"],
    split_rows: bool = False,
) -> Float[Array, "B H W C"]:
    """Bias, SiLU, depthwise 3x3, bias, gate; reference.py says what is computed.

    Value and gate, the halves of the wide tensor, C2 = 2 C: side by side in one array for the plain
    form; as two, each from a product of its own, for the kernel, which needs no copy then.
    split_rows: over the mesh axis that splits tokens; devices exchange the rows where they meet.
    """
    kernel, halves = len(halves) == 2, tuple(halves)
    fn = _kernel if kernel else reference.glumbconv
    weights = bias, depthwise_kernel, depthwise_bias
    axis = sequence_axis(halves[0].shape[1]) if split_rows else None
    if not axis:
        return over_mesh(fn, (), halves, weights, kernel=kernel)

    def between_neighbours(*arrays):
        halves, weights = arrays[:-3], arrays[-3:]
        return fn(*(_with_neighbours(x, axis) for x in halves), *weights)[:, 1:-1]

    return over_mesh(between_neighbours, halves, (), weights, kernel=kernel)


def _with_neighbours(x, axis):
    """This device's rows, and the row above and below: another device's, or OUTSIDE the image."""
    shards, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    down = [(i, i + 1) for i in range(shards - 1)]
    above = jax.lax.ppermute(x[:, -1:], axis, down)
    below = jax.lax.ppermute(x[:, :1], axis, [pair[::-1] for pair in down])
    outside = jnp.asarray(OUTSIDE, x.dtype)
    above = jnp.where(index == 0, outside, above)
    below = jnp.where(index == shards - 1, outside, below)
    return jnp.concatenate([above, x, below], axis=1)


def uses_kernel(height: int, width: int, implementation: str) -> bool:
    """Whether images of this size get the kernel; implementation: see kernels/dispatch.py."""
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
