"""Constants and functions that the kernels for TPU (Pallas Mosaic) share."""

import math

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register
MIB = 2**20


def vmem_bytes() -> int:
    """Returns the VMEM that a kernel may use on the mesh's chip: 100 of a v5e's 128 MiB.

    A v5p has half of that. Without a TPU, as in the interpreter, the chip counts as a v5e.
    """
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = 128 * MIB
    return capacity * 100 // 128


def whole_lanes(size: int) -> int:
    """Returns the elements that an array's last axis of `size` takes in memory."""
    return -(-size // LANES) * LANES


def compiler_params(semantics, blocks, scratch_bytes: int = 0) -> pltpu.CompilerParams:
    """Returns a kernel's compiler parameters: the semantics of its grid, and its limit of VMEM.

    `blocks` are pairs of a BlockSpec and its array, operands and results; VMEM holds two buffers of
    each. XLA prefetches the weights of the next products into the VMEM that no kernel reserves, so
    a kernel asks for what it needs, not for all: its blocks, its scratch, and room for the values
    between them, 32 MiB at least. With 100 MiB for each kernel, the forward pass of the 1.6B
    transformer took 12 % more cycles by the compiler's estimate (README.md here).
    """
    needed = scratch_bytes + 16 * MIB
    for spec, array in blocks:
        sizes = [getattr(size, "block_size", size) for size in spec.block_shape]
        *rest, rows, lanes = sizes
        tile = 8 * 4 // jnp.dtype(array.dtype).itemsize  # rows of 32 bits in the sublanes
        padded = (-(-rows // tile) * tile) * whole_lanes(lanes)
        needed += 2 * math.prod(rest) * padded * jnp.dtype(array.dtype).itemsize
    limit = min(max(needed, 32 * MIB), vmem_bytes())
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)


def half_silu(h):
    """Returns silu(2 h) with one transcendental and no division."""
    return h * jnp.tanh(h) + h
