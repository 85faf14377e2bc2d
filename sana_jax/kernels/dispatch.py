"""Which implementation of an operation runs where."""

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
MIN_VMEM_BYTES = 32 * 2**20  # more than a v4 has; no kernel was made for less


def use_pallas(
    implementation: str, operation: str, dtype: DTypeLike, unsupported: str | None
) -> bool:
    """Whether to call the kernel, which falls back by itself on platforms without one.

    "auto" means the kernel on a TPU. On a GPU it has to be asked for by "pallas": the Triton forms
    are tested in the interpreter and lower for CUDA, but were never timed there. `unsupported` says
    why this shape has no kernel, which is logged once.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "xla" or (implementation == "auto" and _platform() != "tpu"):
        return False
    unsupported = unsupported or _unsupported(jnp.dtype(dtype))
    if unsupported:
        _say_once(f"{operation}: no kernel for {unsupported}, running plain XLA")
    return not unsupported


def _unsupported(dtype: jnp.dtype) -> str | None:
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"{dtype}"  # Mosaic loads none, and no test runs the Triton forms on one
    if _platform() == "tpu" and vmem_bytes() < MIN_VMEM_BYTES:
        return "a chip with so little VMEM"
    return None


def _platform() -> str:
    """Of the mesh that is set: a program may be compiled for devices that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


_say_once = functools.cache(logging.warning)


def by_platform(*args: jax.Array, plain: Callable, **kernels: Callable):
    """`kernels[platform]` on the platforms that have one, `plain` elsewhere."""
    return jax.lax.platform_dependent(*args, default=plain, **kernels)


def _mesh_to_split():
    """The mesh that is set; None where there is none, or a part of it is computed already."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def _divides(batch: int, mesh) -> bool:
    return batch % batch_divisor(mesh) == 0


def sequence_axis(tokens: int) -> str | None:
    """The axis over which the mesh that is set splits so many tokens, or rows of them, if any."""
    mesh = _mesh_to_split()
    if mesh is None:
        return None
    shards = mesh.shape["sequence"]
    return "sequence" if shards > 1 and tokens % shards == 0 else None


def copies(batch: int, sequence: str | None) -> int:
    """How many devices compute each part in `over_mesh` with a kernel.

    Its gradient is split among them and added up: so often does it count what is no gradient.
    """
    mesh = _mesh_to_split()
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
    """fn(*tokens, *images, *weights) on every device's part, under the mesh that is set, if any.

    Axis 0 of `tokens` and `images` is the batch; axis 1 of `tokens` is split where `sequence_axis`
    says so, and fn has to exchange over that axis what it needs. The compiler cannot split a kernel
    and would copy everything to every device. A batch that the mesh does not divide is computed
    whole everywhere; so are heads that it splits. Without a kernel, the compiler is left to split
    all but the tokens.
    """
    arrays = *tokens, *images
    mesh = _mesh_to_split()
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
