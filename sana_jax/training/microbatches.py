"""Microbatches: a batch computed part by part, in the memory that one part needs."""

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
    """Returns `jax.value_and_grad(loss, has_aux=True)(params, batch)`, averaged over microbatches.

    `loss` must be as `mean_over_microbatches` needs it.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    return mean_over_microbatches(lambda rows: gradient(params, rows), batch, count)


def mean_over_microbatches(
    function: Callable[[PyTree], PyTree], batch: PyTree, count: int = 1
) -> PyTree:
    """Returns `function(batch)`, computed in the memory of a batch `count` times smaller.

    The result equals that of the whole batch where `function` returns only means over rows, and
    sums of such means. Noise drawn for each row has to be in the batch, not drawn in `function`.

    Args:
      function: maps a tree of rows to a tree of arrays.
      batch: a tree of arrays whose first axis is the batch.
      count: the number of microbatches; it must divide the batch.

    Raises:
      UserError: `count` does not divide the batch.
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
    """Returns `function(batch)`, which maps rows to rows, in the memory of a `count`th of a batch.

    Raises UserError if `count` does not divide the batch.
    """
    if count == 1:
        return function(batch)
    parts = jax.lax.map(function, _split(batch, count))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def _split(batch: PyTree, count: int) -> PyTree:
    """Reshapes (B, ...) to (count, B / count, ...)."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if count < 1 or rows % count:
        raise UserError(f"a batch of {rows} does not split into {count} microbatches")

    def split(x):  # a part is every count-th row, so that rows stay on their devices
        return x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)
