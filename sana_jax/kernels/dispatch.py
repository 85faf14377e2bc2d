"""Decides which implementation of an operation runs, and runs it on the parts of a mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sana_jax.kernels.mosaic import vmem_bytes
from sana_jax.sharding import batch_divisor

IMPLEMENTATIONS = ("auto", "xla", "pallas")
MIN_VMEM_BYTES = 32 * 2**20  # more than a v4 has; no kernel was written for less
# Nothing was timed on a GPU. Here are the operations whose kernel has a lower bound than XLA's own
# form, by bytes and instructions of what the CUDA compiler makes of either: see README.md.
GPU_AUTO = {"cross attention", "linear attention", "glumbconv"}


def use_kernel(
    implementation: str, operation: str, dtype: DTypeLike, *, tpu: str | None, gpu: str | None
) -> bool:
    """Returns True to call the kernel, for which `by_platform` has a plain form as well.

    `tpu` and `gpu` say why this shape has no kernel there, or are None; the reason is logged once.
    "auto" means the kernel on a TPU, and on a GPU for the operations of GPU_AUTO in half precision.
    "pallas" means it wherever one exists. Raises ValueError for an unknown `implementation`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    on, dtype = platform(), jnp.dtype(dtype)
    if implementation == "xla" or (implementation == "auto" and not _auto(on, operation, dtype)):
        return False
    unsupported = (gpu if on == "gpu" else tpu) or _unsupported(on, dtype)
    if unsupported:
        _say_once(f"{operation}: no kernel for {unsupported}, running plain XLA")
    return not unsupported


def use_image_kernel(
    implementation: str, operation: str, shape: tuple[int, ...], dtype: DTypeLike, fits: int
) -> bool:
    """Returns True to call a kernel for bfloat16 images, which a TPU alone has.

    `fits` is false where images of `shape` have no kernel.
    """
    dtype, size = jnp.dtype(dtype), " x ".join(map(str, shape[1:]))
    unsupported = None if dtype == jnp.bfloat16 and fits else f"{dtype} images of {size}"
    return use_kernel(implementation, operation, dtype, tpu=unsupported, gpu="a GPU")


def _auto(on: str, operation: str, dtype: jnp.dtype) -> bool:
    return on == "tpu" or (on == "gpu" and operation in GPU_AUTO and dtype.itemsize == 2)


def _unsupported(on: str, dtype: jnp.dtype) -> str | None:
    if dtype not in (jnp.float32, jnp.bfloat16) and (on != "gpu" or dtype != jnp.float16):
        return f"{dtype}"  # Mosaic loads no other
    if on == "tpu" and vmem_bytes() < MIN_VMEM_BYTES:
        return "a chip with so little VMEM"
    return None


def platform() -> str:
    """Returns "tpu", "gpu" or "cpu".

    It is that of the mesh, since a program may be compiled for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name == "cuda" else name


_say_once = functools.cache(logging.warning)


def by_platform(*args: jax.Array, plain: Callable, **kernels: Callable):
    """Runs `kernels[platform]` on the platforms that have one, and `plain` on all others."""
    return jax.lax.platform_dependent(*args, default=plain, **kernels)


def plain_gradient(plain: Callable) -> Callable:
    """Returns a decorator: a function's gradient is that of `plain`, computed from the start."""

    def decorate(function: Callable) -> Callable:
        differentiable = jax.custom_vjp(function)

        def forward(*args):
            return differentiable(*args), args

        def backward(args, cotangent):
            return jax.vjp(plain, *args)[1](cotangent)

        differentiable.defvjp(forward, backward)
        return differentiable

    return decorate


def mesh_to_split():
    """Returns the mesh that is set; None without one, or if this is inside a shard_map already."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def _divides(batch: int, mesh) -> bool:
    return batch % batch_divisor(mesh) == 0


def sequence_axis(tokens: int) -> str | None:
    """Returns the mesh axis that splits `tokens` tokens, or rows of tokens; None if none does."""
    mesh = mesh_to_split()
    if mesh is None:
        return None
    shards = mesh.shape["sequence"]
    return "sequence" if shards > 1 and tokens % shards == 0 else None


def copies(batch: int, sequence: str | None) -> int:
    """Returns the number of devices that compute the same part in `over_mesh` with a kernel.

    shard_map sums the gradient over these devices, so a value that is not a gradient counts that
    many times and has to be divided by it.
    """
    mesh = mesh_to_split()
    if mesh is None:
        return 1
    shards = batch_divisor(mesh) if _divides(batch, mesh) else 1
    return mesh.size // (shards * (mesh.shape["sequence"] if sequence else 1))


def over_mesh(
    fn: Callable,
    tokens: tuple[jax.Array, ...],
    images: tuple[jax.Array, ...] = (),
    weights: tuple[jax.Array, ...] = (),
    *,
    kernel: bool = True,
):
    """Computes fn(*tokens, *images, *weights) on every device's part, if a mesh is set.

    Axis 0 of `tokens` and `images` is the batch; axis 1 of `tokens` is split over `sequence_axis`,
    over which fn has to exchange the data it needs. The compiler cannot split a kernel and would
    copy everything to every device. A batch that the mesh does not divide is computed whole on
    every device, and so are heads that the mesh splits. Without a kernel, the compiler splits
    everything but the tokens.
    """
    arrays = *tokens, *images
    mesh = mesh_to_split()
    sequence = sequence_axis(tokens[0].shape[1]) if tokens else None
    if mesh is None or not (kernel or sequence):
        return fn(*arrays, *weights)
    batch = ("replica", "fsdp") if kernel and _divides(arrays[0].shape[0], mesh) else None
    split = P(batch, sequence)
    return jax.shard_map(
        fn,
        in_specs=(split,) * len(tokens) + (P(batch),) * len(images) + (P(),) * len(weights),
        out_specs=split,
        axis_names=set(mesh.axis_names) if kernel else {sequence},
        check_vma=False,
    )(*arrays, *weights)
