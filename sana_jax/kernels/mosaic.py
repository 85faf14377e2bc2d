"""What the kernels for TPU (Pallas Mosaic) share."""

import jax.numpy as jnp

LANES = 128
VMEM_BYTES = 100 * 2**20  # of a v5e's 128 MiB: what a kernel may ask for


def half_silu(h):
    """silu(2 h): one transcendental, no division."""
    return h * jnp.tanh(h) + h
