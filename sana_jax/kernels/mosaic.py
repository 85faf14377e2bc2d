"""What the kernels for TPU (Pallas Mosaic) share."""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def vmem_bytes() -> int:
    """What a kernel may ask for, of the chip that the mesh names: 100 of a v5e's 128 MiB.

    A v5p has half of that. Where there is no TPU, as in the interpreter, it is a v5e's.
    """
    try:
        capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        capacity = 128 * 2**20
    return capacity * 100 // 128


def half_silu(h):
    """silu(2 h): one transcendental, no division."""
    return h * jnp.tanh(h) + h
