"""What a training keeps of its layers' activations, and computes again for the gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from sana_jax.kernels.int8 import layer_of

_policies = jax.checkpoint_policies
# Name -> the activations of a block that the forward pass keeps; the backward pass recomputes all
# others. "none" keeps all. Every block's input is kept, by "offload" in host memory.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def remat_scan(layer: Callable[..., Any], x: Any, stack: Any, *shared: Any) -> Any:
    """Returns `x = layer(x, row, *shared)` of all rows of `stack`, one after the other.

    It keeps each layer's x alone, as a `jax.lax.scan` over `jax.checkpoint`, whose loop runs in
    reverse for the gradients. On a TPU, XLA fills a reversed scan's stack of results with zeros,
    and the loop overwrites them all: 4 % of the cycles of 1.6B's blocks (kernels/README.md). Here
    it starts uninitialised there. All floats may be differentiated, in reverse mode alone.

    Args:
      layer: (x, row, *shared) -> the next x, of the same shapes and dtypes; a function of its
        arguments alone.
      x: a tree of floats, of which one is kept for every layer.
      stack: a tree of arrays with a leading axis of layers.
      shared: trees of arrays that all layers get.
    """
    return _forward(layer, x, stack, *shared)[0]


def _forward(layer, x, stack, *shared):
    def step(x, row):
        return layer(x, row, *shared), x

    out, inputs = jax.lax.scan(step, x, stack)
    return out, (inputs, stack, shared)


def _backward(layer, kept, cotangent):
    inputs, stack, shared = kept
    depth = jax.tree.leaves(stack)[0].shape[0]

    def step(turn, state):
        i = depth - 1 - turn
        cotangent, gradients, sums = state
        x, row = layer_of((inputs, stack), i)
        _, pull = jax.vjp(layer, x, row, *shared)
        cotangent, of_row, *of_shared = _floats(pull(cotangent))
        write = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        gradients = jax.tree.map(write, gradients, of_row)
        return cotangent, gradients, jax.tree.map(jnp.add, sums, of_shared)

    gradients = jax.tree.map(_unwritten, _floats(stack))
    sums = jax.tree.map(jnp.zeros_like, _floats([*shared]))
    state = cotangent, gradients, sums
    cotangent, gradients, sums = jax.lax.fori_loop(0, depth, step, state)
    return cotangent, gradients, *sums


def _unwritten(x):
    """Returns an array like x, whose values do not matter.

    On a GPU, XLA does not split an uninitialised array over a mesh: every device would have all of
    it (jax 0.10.2 and 0.11.0; findings/xla_gpu_does_not_split_an_empty_array.sh).
    """
    return jax.lax.platform_dependent(
        tpu=lambda: jax.lax.empty(x.shape, x.dtype), default=lambda: jnp.zeros(x.shape, x.dtype)
    )


def _floats(tree):
    """Returns the tree with None for what has no gradient: JAX takes that for zero."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)


remat_scan.defvjp(_forward, _backward)
