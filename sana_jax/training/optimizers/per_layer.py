"""Optimizers on stacked weights: each layer is updated alone, each state placed as its weight.

`nn.scan` keeps the layers of a stack as one array with a leading axis named "layers". An optimizer
that counts the axes of a weight, or takes a norm over it, would take the stack for one weight.
"""

from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any


def is_box(x: Any) -> bool:
    """Returns whether x is a parameter boxed with its logical axes."""
    return isinstance(x, nn.LogicallyPartitioned)


def layer_counts(params: PyTree) -> PyTree:
    """Returns the number of layers of each stacked parameter, and 0 for every other one.

    A stack is known by the name of its first axis, so it has to be boxed.
    """

    def count(x):
        return x.value.shape[0] if is_box(x) and x.names[:1] == ("layers",) else 0

    return jax.tree.map(count, params, is_leaf=is_box)


def per_layer(tx: optax.GradientTransformation, layers: PyTree) -> optax.GradientTransformation:
    """Returns an optimizer that applies `tx` to each layer of a stack as to a parameter.

    Args:
      tx: an optimizer that treats every parameter alone, so without a norm over all of them.
      layers: the result of `layer_counts`.
    """
    counts = set(jax.tree.leaves(layers))
    if counts <= {0}:
        return tx
    transforms = {str(count): _mapped(tx) if count else tx for count in counts}
    return optax.partition(transforms, jax.tree.map(str, layers))


def _mapped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        return jax.vmap(tx.update)(updates, state, params)

    return optax.GradientTransformation(jax.vmap(tx.init), update)


def with_axes(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with its state boxed as the parameters are: each leaf with its own axes."""

    def init(params):
        state = tx.init(jax.tree.map(_unbox, params, is_leaf=is_box))
        return jax.tree.map(_box, state, _state_axes(tx, params))

    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformationExtraArgs(init, tx.update)


def _state_axes(tx, params) -> PyTree:
    """Returns the logical axes of a state's leaves, such as ("embed",) for a mean over "mlp".

    JAX itself tells which axis of a parameter became which axis of the state: it follows shardings
    over the axes of a mesh through every operation, and this mesh has the logical names.
    """
    boxes = [x for x in jax.tree.leaves(params, is_leaf=is_box) if is_box(x)]
    names = tuple(sorted({name for box in boxes for name in box.names if name}))
    current = jax.sharding.get_abstract_mesh()  # JAX wants the size of a mesh that is already set
    sizes = (1 if current.empty else current.size, *(1 for _ in names))
    mesh = AbstractMesh(sizes, ("", *names), axis_types=(AxisType.Explicit,) * len(sizes))

    def typed(x):
        axes, x = (x.names, x.value) if is_box(x) else ((), x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))

    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params, is_leaf=is_box))
    return jax.tree.map(lambda leaf: tuple(leaf.sharding.spec) if leaf.sharding else (), state)


def _unbox(x):
    return x.value if is_box(x) else x


def _box(leaf, axes):
    return nn.LogicallyPartitioned(leaf, axes) if any(axes) else leaf
