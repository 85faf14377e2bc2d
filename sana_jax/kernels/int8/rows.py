"""Int8 rows, as the kernels for TPU hand them over.

A row's scale is known when all of the row is, so a kernel that gives int8 rows holds whole rows in
VMEM, and rounds them at its end as reference.py does.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from sana_jax.kernels.int8 import reference
from sana_jax.kernels.mosaic import whole_lanes


class Rows(NamedTuple):
    """Rows that are values * scale."""

    values: Int8[Array, "*B C"]
    scale: Float[Array, "*B 1"]  # float32


def quantised(x: Float[Array, "*B C"]) -> Rows:
    """Returns int8 rows, inside a kernel or outside."""
    scale = reference.scale_of(x)
    return Rows(reference.values_of(x, scale), scale)


def row_shapes(*shape: int) -> Rows:
    """Returns what int8 rows of this shape are, for a kernel's results."""
    make = jax.ShapeDtypeStruct
    return Rows(make(shape, jnp.int8), make((*shape[:-1], 1), jnp.float32))


def then_quantised(body: Callable) -> Callable:
    """Returns a kernel that writes the result of `body`, a block (1, N, C) of rows, as int8 rows.

    `body` writes it into the last operand, a scratch in the network's dtype.
    """

    def kernel(*refs):
        *operands, values_ref, scale_ref, made_ref = refs
        body(*operands, made_ref)
        values_ref[0], scale_ref[0] = quantised(made_ref[0])

    return kernel


def bytes_of(arrays: Iterable[jax.ShapeDtypeStruct | Array]) -> int:
    """Returns the bytes of arrays in HBM, where the last axis fills whole lanes."""
    padded = ((x.size // x.shape[-1] * whole_lanes(x.shape[-1]), x) for x in arrays)
    return sum(n * x.dtype.itemsize for n, x in padded)
