"""Constants and functions that the kernels for TPU (Pallas Mosaic) share."""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register


def vmem_bytes() -> int:
    """Returns the VMEM that a kernel may use on the mesh's chip: 100 of a v5e's 128 MiB.

    A v5p has half of that. Without a TPU, as in the interpreter, the chip counts as a v5e.
    """
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = 128 * 2**20
    return capacity * 100 // 128


def half_silu(h):
    """Returns silu(2 h) with one transcendental and no division."""
    return h * jnp.tanh(h) + h
