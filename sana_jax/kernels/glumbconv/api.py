"""Mix-FFN: its middle in the plain form or by a kernel, with rows split over a mesh or not."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.kernels import scaled_product
from sana_jax.kernels.dispatch import (
    by_platform,
    copies,
    over_mesh,
    platform,
    sequence_axis,
    use_kernel,
)
from sana_jax.kernels.glumbconv import gpu, reference, tpu
from sana_jax.kernels.int8 import Weight, cast, multiply
from sana_jax.kernels.mosaic import LANES

OUTSIDE = -1e4  # SiLU turns it into zero after any bias, and its cotangent too


def glumbconv(
    x: Float[Array, "B H W C"],
    expand: Float[Array, "C D2"] | Weight,
    weights: tuple[Float[Array, " D2"], Float[Array, "3 3 D2"], Float[Array, " D2"]],
    contract: Float[Array, "D E"] | Weight,
    scale: Float[Array, "#B #H #W E"] | None = None,
    *,
    split_rows: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B H W E"]:
    """Computes Mix-FFN: a product to D2 = 2 D channels, reference.py's middle, one back, a factor.

    `expand` and `contract` may be quantised. `weights` are the bias, depthwise kernel and depthwise
    bias of the middle. `scale` is the factor
    in float32; None means one. `split_rows` splits rows over the mesh axis that splits tokens;
    devices exchange the rows where they meet. `implementation` is "auto", "xla" or "pallas", see
    kernels/dispatch.py.
    """
    expand, contract = (cast(kernel, x.dtype) for kernel in (expand, contract))
    if uses_kernel(*x.shape[1:3], x.dtype, implementation):
        # On a TPU value and gate are products of their own; a GPU's kernel reads them from one.
        parts = (expand,) if platform() == "gpu" else _halves(expand)
        images = tuple(multiply(x, part) for part in parts)
        return projected_glumbconv(split_rows, images, weights, contract, scale)
    wide = multiply(x, expand)
    y = _by_rows(reference.glumbconv, (wide,), (), weights, split_rows, kernel=False)
    return _project(y, contract, scale)


def _halves(kernel: Float[Array, "C D2"] | Weight) -> tuple[Float[Array, "C D"] | Weight, ...]:
    half = kernel.shape[1] // 2
    if isinstance(kernel, Weight):
        return tuple(kernel.columns(start, start + half) for start in (0, half))
    halves = tuple(jnp.split(kernel, 2, axis=1))
    return _cut_out(halves) if half % LANES else halves


@jax.custom_jvp
def _cut_out(halves):
    """Returns the halves, which a TPU cuts apart before the products, if nothing has a gradient.

    A product that shifts its weights by less than a tile itself is slower. Where there is a
    gradient, XLA chooses a layout for each of the products that read them, and so does better.
    """
    return by_platform(*halves, plain=lambda *x: x, tpu=lambda *x: jax.lax.optimization_barrier(x))


@_cut_out.defjvp
def _tangent(primals, tangents):
    return *primals, *tangents


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def projected_glumbconv(
    split_rows: bool,
    images: tuple[Float[Array, "B H W _"], ...],
    weights: tuple[Float[Array, " C2"], Float[Array, "3 3 C2"], Float[Array, " C2"]],
    projection: Float[Array, "C D"] | Weight,
    scale: Float[Array, "#B #H #W D"] | None,
) -> Float[Array, "B H W D"]:
    """Computes the middle by the kernel, then the product back and the factor.

    `images` are value and gate, the halves of the wide tensor, each from its own product, which
    avoids a copy; or one array, the wide tensor. The other arguments are those of `glumbconv`. If
    only the backward pass follows, as in rematerialisation, the forward kernel does not run: the
    backward kernel gives its result.
    """
    return _project(_middle(split_rows, images, weights), projection, scale)


def _project(x, projection, scale):
    y = multiply(x, projection)
    return y if scale is None else (scale * y.astype(jnp.float32)).astype(x.dtype)


def _project_again(x, projection, scale):
    """Computes `_project` for the gradients of the weights and the factor."""
    batch, height, width, channels = x.shape
    sizes = batch, height * width, channels, projection.shape[1], x.dtype.itemsize
    by_image = scale is not None and scale.shape[:3] == (batch, 1, 1)
    if isinstance(projection, Weight) or not by_image or not scaled_product.supported(*sizes):
        return _project(x, projection, scale)
    rows = x.reshape(batch, -1, channels)
    y = scaled_product.scaled_product(rows, projection, scale[:, 0])
    return y.reshape(batch, height, width, -1)


def _middle(split_rows, images, weights, out=None):
    """Runs the kernel. `out` may hold anything; its cotangent is the kernel's result."""
    out = _nothing(images, weights) if out is None else out
    return _by_rows(_kernel, images, (out,), weights, split_rows, kernel=True)


def _nothing(images, weights):
    """Returns zeros in the shape of the middle's result."""
    return jnp.zeros((*images[0].shape[:3], weights[0].size // 2), images[0].dtype)


def _projected_forward(split_rows, *args):
    return projected_glumbconv(split_rows, *args), args


def _projected_backward(split_rows, args, cotangent):
    images, weights, *after = args
    # Cuts a layer's weights out of the stack first: a product that does so itself is slower.
    after = jax.lax.optimization_barrier(after)
    nothing = _nothing(images, weights)
    d_x = jax.vjp(lambda x: _project(x, *after), nothing)[1](cotangent)[0]  # linear in x

    def middle(out, images, weights):
        return _middle(split_rows, images, weights, out)

    # One kernel gives the result x and the cotangents.
    x, d_images, d_weights = jax.vjp(middle, nothing, images, weights)[1](d_x)
    batch, rows = nothing.shape[:2]
    x = x / copies(batch, sequence_axis(rows) if split_rows else None)  # not a gradient
    d_after = jax.vjp(lambda *after: _project_again(x, *after), *after)[1](cotangent)
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
    on_tpu = None if fits else f"images of {height} x {width}"
    on_gpu = None if gpu.supported() else "a GPU by this JAX, which has no Triton"
    return use_kernel(implementation, "glumbconv", dtype, tpu=on_tpu, gpu=on_gpu)


def _plain(*args):
    *images, bias, kernel, depthwise_bias = args
    wide = images[0] if len(images) == 1 else jnp.concatenate(images, axis=-1)
    return reference.glumbconv(wide, bias, kernel, depthwise_bias)


def by_halves(bias, kernel, depthwise_bias):
    """Returns the weights in the kernel's shapes: (2, C), (9, 2, C), (2, C)."""
    return bias.reshape(2, -1), kernel.reshape(9, 2, -1), depthwise_bias.reshape(2, -1)


def _kernels(images, on_tpu, on_gpu):
    """Returns the kernels by platform; a TPU's takes two images."""
    tpu = {"tpu": on_tpu} if images == 2 else {}
    return tpu | ({"cuda": on_gpu} if gpu.supported() else {})


@jax.custom_vjp
def _kernel(*args):
    """Computes the middle from value and gate, or one array of both, then any `out` and weights."""
    *images, _, bias, kernel, depthwise_bias = args
    count = len(images)

    def on_tpu(*args):
        return tpu.forward(*args[:2], *by_halves(*args[2:]))

    def on_gpu(*args):
        return gpu.forward(args[:count], *by_halves(*args[count:]))

    kernels = _kernels(count, on_tpu, on_gpu)
    return by_platform(*images, bias, kernel, depthwise_bias, plain=_plain, **kernels)


def _forward(*args):
    *images, _, bias, kernel, depthwise_bias = args
    return _kernel(*args), (*images, bias, kernel, depthwise_bias)


def _backward(args, cotangent):
    count = len(args) - 3

    def in_order(out, d_images, d_weights, weights):
        pairs = zip(d_weights, weights, strict=True)
        return *d_images, out, *(d.reshape(w.shape).astype(w.dtype) for d, w in pairs)

    def on_tpu(*args):
        *images, bias, kernel, depthwise_bias, cotangent = args
        weights = bias, kernel, depthwise_bias
        out, d_value, d_gate, *d_weights = tpu.backward(*images, *by_halves(*weights), cotangent)
        return in_order(out, (d_value, d_gate), d_weights, weights)

    def on_gpu(*args):
        images, weights = args[:count], args[count:-1]
        out, d_images, *d_weights = gpu.backward(images, *by_halves(*weights), args[-1])
        return in_order(out, d_images, d_weights, weights)

    def plain(*args):
        out, pull_back = jax.vjp(_plain, *args[:-1])
        found = pull_back(args[-1])
        return *found[:count], out, *found[count:]

    kernels = _kernels(count, on_tpu, on_gpu)
    return by_platform(*args, cotangent, plain=plain, **kernels)


_kernel.defvjp(_forward, _backward)
