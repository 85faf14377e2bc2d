"""A batch computed in parts, in the memory of one of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.runtime.errors import UserError

PyTree = Any


def accumulated_gradients(
    loss: Callable[[PyTree, PyTree], tuple[Float[Array, ""], PyTree]],
    params: PyTree,
    batch: PyTree,
    count: int = 1,
) -> tuple[tuple[Float[Array, ""], PyTree], PyTree]:
    """`jax.value_and_grad(loss, has_aux=True)` by `mean_over_microbatches`."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    return mean_over_microbatches(lambda rows: gradient(params, rows), batch, count)


def mean_over_microbatches(
    function: Callable[[PyTree], PyTree], batch: PyTree, count: int = 1
) -> PyTree:
    """`function(batch)` in the memory of a batch `count` times smaller.

    Equal to the whole batch where all that `function` returns are means over rows, and sums of
    such. Noise that is drawn a row has to be in the batch, not drawn in the function.

    Args:
      function: of a tree of rows; returns a tree of arrays.
      batch: a tree of arrays whose first axis is the batch.
      count: microbatches; must divide the batch.
    """
    if count == 1:
        return function(batch)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, function(micro)), None

    micros = _split(batch, count)
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, micros)
    return jax.tree.map(lambda x: x / count, total)


def map_microbatches(function: Callable[[PyTree], PyTree], batch: PyTree, count: int = 1) -> PyTree:
    """`function(batch)`, rows to rows, in the memory of a batch `count` times smaller."""
    if count == 1:
        return function(batch)
    parts = jax.lax.map(function, _split(batch, count))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def _split(batch: PyTree, count: int) -> PyTree:
    """(B, ...) as (count, B / count, ...)."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if count < 1 or rows % count:
        raise UserError(f"a batch of {rows} does not split into {count} microbatches")

    def split(x):  # every count-th row: each device's rows stay on it
        return x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
