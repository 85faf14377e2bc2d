"""Fingerprints of arrays: they reveal a damaged checkpoint, which Orbax reads without complaint.

The checksum of an array is sum_i mix(bits_i ^ mix(i)) mod 2**32 over its elements i, with `mix`
the finaliser of MurmurHash3, a bijection. Any change of one element changes the checksum; of
other changes, one in 2**32 goes unnoticed. Addition has no order, so the checksum depends
neither on the mesh nor on the files.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def checksums(tree: Any) -> Any:
    """Returns the checksum of every leaf, as a tree of ints; waits for the leaves.

    Leaves are arrays of numbers, booleans or PRNG keys, on devices or not, sharded or not.
    """
    return jax.tree.map(int, jax.device_get(_checksums(tree)))


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(_checksum, tree)


def _checksum(array: Array) -> UInt32[Array, ""]:
    bits = _bits(array)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position * jnp.uint32(size % 2**32) + index
    return _mix(bits ^ _mix(position)).sum(dtype=jnp.uint32)


def _bits(array: Array) -> UInt32[Array, "..."]:
    """Returns the bits of each element; a 64-bit element becomes two along a new last axis."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    return jax.lax.bitcast_convert_type(array, width).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
