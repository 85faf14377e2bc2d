"""Which implementation of an operation runs where."""

import functools
from collections.abc import Callable

import jax
from absl import logging
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sana_jax.sharding import batch_divisor

IMPLEMENTATIONS = ("auto", "xla", "pallas")


def use_pallas(implementation: str, operation: str, unsupported: str | None) -> bool:
    """Whether to call the kernel, which falls back by itself on platforms without one.

    "auto" means the kernel on a TPU. On a GPU it has to be asked for by "pallas": the Triton forms
    are tested in the interpreter and lower for CUDA, but were never timed there. `unsupported` says
    why this shape has no kernel, which is logged once.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is not one of {IMPLEMENTATIONS}")
    if implementation == "xla" or (implementation == "auto" and jax.default_backend() != "tpu"):
        return False
    if unsupported:
        _say_once(f"{operation}: no kernel for {unsupported}, running plain XLA")
    return not unsupported


_say_once = functools.cache(logging.warning)


def by_platform(*args: jax.Array, plain: Callable, **kernels: Callable):
    """`kernels[platform]` on the platforms that have one, `plain` elsewhere."""
    return jax.lax.platform_dependent(*args, default=plain, **kernels)


def over_batch(fn: Callable, arrays: tuple[jax.Array, ...], weights: tuple[jax.Array, ...] = ()):
    """fn(*arrays, *weights) on every device's images, under the mesh that is set, if any.

    The compiler cannot split a kernel and would copy everything to every device. A batch that the
    mesh does not divide is computed whole everywhere; so are tokens and heads that a mesh splits.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return fn(*arrays, *weights)
    whole = arrays[0].shape[0] % batch_divisor(mesh)
    batch = P() if whole else P(("replica", "fsdp"))
    specs = (batch,) * len(arrays) + (P(),) * len(weights)
    return jax.shard_map(fn, in_specs=specs, out_specs=batch, check_vma=False)(*arrays, *weights)
