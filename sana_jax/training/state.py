"""The state that one training step hands to the next, and the guard that keeps NaN out of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sana_jax import sharding

PyTree = Any


@struct.dataclass
class TrainState:
    """Everything that decides the next step, except the batch.

    Attributes:
      step: batches consumed, including those of skipped updates.
      params, opt_state: of the networks that train; of several as a dict of trees.
      ema: the moving average of `params`, or None.
      skipped: updates left out so far because something was not finite.
      streak: updates left out in a row.
      key: the key of the whole run, which never changes; a step uses `step_key`.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    key: Array

    def step_key(self) -> Array:
        """Returns the key of this step."""
        return jax.random.fold_in(self.key, self.step)


def new_state(params: PyTree, opt_state: PyTree, key: Array, ema: bool = True) -> TrainState:
    """Returns the state before the first step; its average is a copy of the parameters."""

    def zero():  # an array for each field, as a buffer can be donated only once
        return jnp.zeros((), jnp.int32)

    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(zero(), params, opt_state, average, zero(), zero(), key)


def on_mesh(
    init: Callable[[], TrainState], mesh: Mesh
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Places every leaf of a state on a mesh, by the rules of sharding.py.

    Args:
      init: makes the state from nothing; its leaves may be boxed with their logical axes, as
        `module.init` returns them, and an optimizer's `init` on such parameters.
      mesh: the devices.

    Returns:
      The abstract state, whose leaves have shape, dtype and sharding (as a restore needs them), and
      a function that makes the state, with every leaf on its devices from the start. Neither state
      has boxes.
    """
    boxed = jax.eval_shape(init)
    shardings = sharding.shardings_for(boxed, mesh)

    def abstract(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    create = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)
    return jax.tree.map(abstract, nn.unbox(boxed), shardings), create


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Returns whether no number in a tree is NaN or infinite; integers are not looked at."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves] or [jnp.array(True)]).all()


def keep_if(finite: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Returns `new` where `finite` holds, else `old` to the bit, without a branch or a wait."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def advance(state: TrainState, finite: Bool[Array, ""], **new: PyTree) -> TrainState:
    """Returns the state after a step.

    Args:
      state: the state before the step.
      finite: whether the losses and the gradients' norms are finite.
      new: the fields' new values (params=..., opt_state=..., ema=...). Unless `finite` holds and
        the new parameters are finite, the fields stay as they were and the step counts as skipped.
    """
    finite = finite & all_finite(new.get("params", ()))
    kept = {name: keep_if(finite, value, getattr(state, name)) for name, value in new.items()}
    return state.replace(
        step=state.step + 1,
        skipped=state.skipped + jnp.where(finite, 0, 1),
        streak=jnp.where(finite, 0, state.streak + 1),
        **kept,
    )


def update_ema(
    ema: PyTree, params: PyTree, decay: float, step: Int[Array, ""] | None = None
) -> PyTree:
    """Returns the moving average after a step whose new parameters are `params`.

    With `step`, the number of updates before this one, the decay warms up as
    min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten. Where a parameter
    equals its average, the average stays as it is to the bit.
    """
    rate: Float[Array, ""] | float = 1 - decay
    if step is not None:
        rate = jnp.maximum(rate, 9 / (10 + step.astype(jnp.float32)))

    def follow(average, new):  # adding 0.0 would turn -0.0 into 0.0
        moved = average + (rate * (new - average)).astype(average.dtype)
        return jnp.where(new == average, average, moved)

    return jax.tree.map(follow, ema, params)
