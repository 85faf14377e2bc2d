"""A product with weights times a factor, with a gradient of the factor that a TPU is fast at.

    y = scale (x W)        d_scale = sum over tokens of cotangent (x W)

With G, the products x^T cotangent of each image, the gradient of the weights holds that of the
factor, and nothing has to compute x W again:

    d_W = sum over images of scale G        d_scale = sum over inputs of W G

Log: TPU compiler's estimate, v5e, 1024 px, million cycles a layer, 1.6B at batch 8.

- Two products by XLA, for x W again and for d_W: 3.95 with that of d_x, and 1.83. One kernel:
  predicted 1.57 for its FLOPs, found 1.78; with the product of d_x 4.15 in place of 5.78.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sana_jax.kernels.block_sizes import TPU
from sana_jax.kernels.dispatch import by_platform, mesh_to_split, sequence_axis
from sana_jax.kernels.mixed_einsum import dense_float32
from sana_jax.kernels.mosaic import MIB, compiler_params, vmem_bytes, whole_lanes
from sana_jax.sharding import batch_divisor

INPUTS = TPU["scaled_product"]  # of a grid step


def supported(batch: int, tokens: int, inputs: int, outputs: int, itemsize: int) -> bool:
    """Returns True if the gradient has a kernel: VMEM holds an image, and a mesh splits evenly.

    No mesh may split the inputs.
    """
    mesh = mesh_to_split()
    if mesh is not None and (batch % batch_divisor(mesh) or outputs % mesh.shape["fsdp"]):
        return False
    if mesh is not None and mesh.shape["tensor"] > 1:
        return False
    lanes, block = whole_lanes(outputs), min(INPUTS, whole_lanes(inputs))
    images = 2 * tokens * (block + lanes) * itemsize  # two buffers each
    weights = block * lanes * (4 * itemsize + 12)  # two buffers both ways, and float32
    return images + weights + 16 * MIB < vmem_bytes()


def plain(
    x: Float[Array, "B N C"], kernel: Float[Array, "C D"], scale: Float[Array, "B 1 D"]
) -> Float[Array, "B N D"]:
    """Returns scale (x kernel) in x's dtype; the factor is float32."""
    return (scale * dense_float32(x, kernel).astype(jnp.float32)).astype(x.dtype)


scaled_product = jax.custom_vjp(plain)


def _forward(x, kernel, scale):
    return plain(x, kernel, scale), (x, kernel, scale)


def _backward(saved, cotangent):
    x, kernel, scale = saved

    def by_product(x, kernel, scale, cotangent):
        return jax.vjp(partial(plain, x), kernel, scale)[1](cotangent)

    d_x = jax.vjp(lambda x: plain(x, kernel, scale), x)[1](cotangent)[0]
    return d_x, *by_platform(*saved, cotangent, plain=by_product, tpu=_over_mesh)


scaled_product.defvjp(_forward, _backward)


def _over_mesh(x, kernel, scale, cotangent):
    """Returns `_gradients` over a mesh; each device keeps its part of the weights' gradient."""
    if mesh_to_split() is None:
        return _gradients(x, kernel, scale, cotangent)
    batch, sequence = ("replica", "fsdp"), sequence_axis(x.shape[1])

    def part(*operands):
        d_kernel, d_scale = _gradients(*operands)
        d_kernel = jax.lax.psum_scatter(d_kernel, "fsdp", scatter_dimension=1, tiled=True)
        d_kernel = jax.lax.psum(d_kernel, ("replica", sequence) if sequence else "replica")
        return d_kernel, jax.lax.psum(d_scale, sequence) if sequence else d_scale

    tokens = P(batch, sequence)
    return jax.shard_map(
        part,
        in_specs=(tokens, P(), P(batch), tokens),
        out_specs=(P(None, "fsdp"), P(batch)),
        check_vma=False,
    )(x, kernel, scale, cotangent)


def _gradients(x, kernel, scale, cotangent):
    """Returns the cotangents of kernel and scale."""
    (batch, tokens, inputs), outputs = x.shape, kernel.shape[1]
    size = min(INPUTS, whole_lanes(inputs))
    specs = [
        pl.BlockSpec((1, tokens, size), lambda i, b: (b, 0, i)),
        pl.BlockSpec((batch, outputs), lambda i, b: (0, 0)),
        pl.BlockSpec((size, outputs), lambda i, b: (i, 0)),
        pl.BlockSpec((1, tokens, outputs), lambda i, b: (b, 0, 0)),
    ]
    operands = x, scale[:, 0].astype(jnp.float32), kernel, cotangent
    results = [jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in operands[1:3]]
    pairs = zip((*specs, *specs[1:3]), (*operands, *results), strict=True)
    blocks = pl.cdiv(inputs, size)
    moved = x.nbytes + 2 * kernel.nbytes + blocks * cotangent.nbytes
    d_scale, d_kernel = pl.pallas_call(
        partial(_gradients_kernel, inputs=inputs),
        out_shape=results,
        grid=(blocks, batch),
        in_specs=specs,
        out_specs=specs[1:3],
        scratch_shapes=[pltpu.VMEM((size, outputs), jnp.float32)],
        compiler_params=compiler_params(
            ("arbitrary", "arbitrary"), list(pairs), 8 * size * whole_lanes(outputs)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size * outputs, bytes_accessed=moved, transcendentals=0
        ),
        name="scaled_product_gradients",
    )(*operands)
    # Where they go next XLA would write in the kernel, but not with the VMEM that it asks for.
    d_scale, d_kernel = jax.lax.optimization_barrier((d_scale, d_kernel))
    return d_kernel, d_scale[:, None].astype(scale.dtype)


def _gradients_kernel(
    x_ref, scale_ref, kernel_ref, cotangent_ref, d_scale_ref, d_kernel_ref, sum_ref, *, inputs
):
    block, image = pl.program_id(0), pl.program_id(1)
    own, exact = pl.ds(image, 1), x_ref.dtype == jnp.float32
    product = jax.lax.dot_general(
        x_ref[0],
        cotangent_ref[0],
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    total = jnp.where(image == 0, 0.0, sum_ref[...]) + product * scale_ref[own]
    sum_ref[...] = total

    @pl.when(image == pl.num_programs(1) - 1)
    def _():
        d_kernel_ref[...] = total.astype(d_kernel_ref.dtype)

    weighted = product * kernel_ref[...].astype(jnp.float32)
    size = weighted.shape[0]
    if inputs % size:  # what lies behind the last input may hold anything
        row = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        weighted = jnp.where(row < inputs - block * size, weighted, 0.0)
    so_far = jnp.where(block == 0, 0.0, d_scale_ref[own])
    d_scale_ref[own] = so_far + jnp.sum(weighted, axis=0, keepdims=True)
