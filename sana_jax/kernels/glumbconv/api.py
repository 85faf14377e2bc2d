"""Mix-FFN: its middle in the plain form or by a kernel, with rows split over a mesh or not."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels.dispatch import (
    by_platform,
    copies,
    over_mesh,
    sequence_axis,
    use_pallas,
)
from sana_jax.kernels.glumbconv import gpu, reference, tpu
from sana_jax.kernels.mixed_einsum import dense_float32

# By platform.
_KERNELS = {"tpu": tpu} | ({"cuda": gpu} if gpu.supported() else {})
OUTSIDE = -1e4  # SiLU turns it into zero after any bias, and its cotangent too


def glumbconv(
    x: Float[Array, "B H W C"],
    expand: Float[Array, "C D2"],
    weights: tuple[Float[Array, " D2"], Float[Array, "3 3 D2"], Float[Array, " D2"]],
    contract: Float[Array, "D E"],
    scale: Float[Array, "#B #H #W E"] | None = None,
    *,
    split_rows: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B H W E"]:
    """Computes Mix-FFN: a product to D2 = 2 D channels, reference.py's middle, one back, a factor.

    `weights` are the bias, depthwise kernel and depthwise bias of the middle. `scale` is the factor
    in float32; None means one. `split_rows` splits rows over the mesh axis that splits tokens;
    devices exchange the rows where they meet. `implementation` is "auto", "xla" or "pallas", see
    kernels/dispatch.py.
    """
    expand = expand.astype(x.dtype)
    if uses_kernel(*x.shape[1:3], x.dtype, implementation):
        images = tuple(dense_float32(x, half) for half in jnp.split(expand, 2, axis=1))
        return projected_glumbconv(split_rows, images, weights, contract.astype(x.dtype), scale)
    wide = dense_float32(x, expand)
    y = _by_rows(reference.glumbconv, (wide,), (), weights, split_rows, kernel=False)
    return _project(y, contract.astype(x.dtype), scale)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def projected_glumbconv(
    split_rows: bool,
    images: tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]],
    weights: tuple[Float[Array, " C2"], Float[Array, "3 3 C2"], Float[Array, " C2"]],
    projection: Float[Array, "C D"],
    scale: Float[Array, "#B #H #W D"] | None,
) -> Float[Array, "B H W D"]:
    """Computes the middle by the kernel, then the product back and the factor.

    `images` are value and gate, the halves of the wide tensor, each from its own product, which
    avoids a copy. The other arguments are those of `glumbconv`. If only the backward pass follows,
    as in rematerialisation, the forward kernel does not run: the backward kernel gives its result.
    """
    return _project(_middle(split_rows, *images, *weights), projection, scale)


def _project(x, projection, scale):
    y = dense_float32(x, projection)
    return y if scale is None else (scale * y.astype(jnp.float32)).astype(x.dtype)


def _middle(split_rows, value, gate, *weights, out=None):
    """Runs the kernel. `out` may hold anything; its cotangent is the kernel's result."""
    out = jnp.zeros_like(value) if out is None else out
    return _by_rows(_kernel, (value, gate), (out,), weights, split_rows, kernel=True)


def _projected_forward(split_rows, *args):
    return projected_glumbconv(split_rows, *args), args


def _projected_backward(split_rows, args, cotangent):
    images, weights, *after = args
    # Cuts a layer's weights out of the stack first: a product that does so itself is slower.
    after = jax.lax.optimization_barrier(after)
    nothing = jnp.zeros_like(images[0])
    d_x = jax.vjp(lambda x: _project(x, *after), nothing)[1](cotangent)[0]  # linear in x

    def middle(out, images, weights):
        return _middle(split_rows, *images, *weights, out=out)

    # One kernel gives the result x and the cotangents.
    x, d_images, d_weights = jax.vjp(middle, nothing, images, weights)[1](d_x)
    batch, rows = nothing.shape[:2]
    x = x / copies(batch, sequence_axis(rows) if split_rows else None)  # not a gradient
    d_after = jax.vjp(lambda *after: _project(x, *after), *after)[1](cotangent)
    return d_images, d_weights, *d_after


projected_glumbconv.defvjp(_projected_forward, _projected_backward)


def _by_rows(fn, images, own, weights, split_rows, kernel):
    """Computes fn(*images, *own, *weights) over the mesh; `own` needs no rows of other devices."""
    axis = sequence_axis(images[0].shape[1]) if split_rows else None
    if not axis:
        return over_mesh(fn, (), images + own, weights, kernel=kernel)

    def between_neighbours(*arrays):
        wide = [_with_neighbours(x, axis) for x in arrays[: len(images)]]
        own = arrays[len(images) : -len(weights)]
        wide += [jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))) for x in own]
        return fn(*wide, *arrays[-len(weights) :])[:, 1:-1]

    return over_mesh(between_neighbours, images + own, (), weights, kernel=kernel)


def _with_neighbours(x, axis):
    """Adds the rows above and below: those of other devices, or OUTSIDE at the image's edges."""
    shards, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    down = [(i, i + 1) for i in range(shards - 1)]
    above = jax.lax.ppermute(x[:, -1:], axis, down)
    below = jax.lax.ppermute(x[:, :1], axis, [pair[::-1] for pair in down])
    outside = jnp.asarray(OUTSIDE, x.dtype)
    above = jnp.where(index == 0, outside, above)
    below = jnp.where(index == shards - 1, outside, below)
    return jnp.concatenate([above, x, below], axis=1)


def uses_kernel(height: int, width: int, dtype: DTypeLike, implementation: str) -> bool:
    """Returns True if images of this size get the kernel; `implementation`: see dispatch.py."""
    fits = tpu.supported(height, width, jnp.dtype(dtype).itemsize)
    unsupported = None if fits else f"images of {height} x {width}"
    return use_pallas(implementation, "glumbconv", dtype, unsupported)


def _plain(value, gate, *weights):
    return reference.glumbconv(jnp.concatenate([value, gate], axis=-1), *weights)


def _by_halves(bias, kernel, depthwise_bias):
    """Returns the weights in the kernel's shapes: (2, C), (9, 2, C), (2, C)."""
    return bias.reshape(2, -1), kernel.reshape(9, 2, -1), depthwise_bias.reshape(2, -1)


@jax.custom_vjp
def _kernel(value, gate, out, *weights):
    def run(module, value, gate, *weights):
        return module.forward(value, gate, *_by_halves(*weights))

    kernels = {name: partial(run, module) for name, module in _KERNELS.items()}
    return by_platform(value, gate, *weights, plain=_plain, **kernels)


def _forward(value, gate, out, *weights):
    return _kernel(value, gate, out, *weights), (value, gate, *weights)


def _backward(args, cotangent):
    def run(module, value, gate, *rest):
        *weights, cotangent = rest
        found = module.backward(value, gate, *_by_halves(*weights), cotangent)
        out, d_value, d_gate, *d_weights = found
        pairs = zip(d_weights, weights, strict=True)
        return d_value, d_gate, out, *(d.reshape(w.shape).astype(w.dtype) for d, w in pairs)

    def plain(*args):
        out, pull_back = jax.vjp(_plain, *args[:-1])
        d_value, d_gate, *d_weights = pull_back(args[-1])
        return d_value, d_gate, out, *d_weights

    kernels = {name: partial(run, module) for name, module in _KERNELS.items()}
    return by_platform(*args, cotangent, plain=plain, **kernels)


_kernel.defvjp(_forward, _backward)
