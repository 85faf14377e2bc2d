"""What a step of training carries over to the next, and the guard that keeps NaN out of it."""

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
    """Everything that decides the next step, but for the batch.

    Attributes:
      step: batches consumed, those of skipped updates too.
      params, opt_state: what trains; several networks are a dict of trees.
      ema: the moving average of `params`, or None.
      skipped: updates left out in all, because something was not finite.
      streak: updates left out in a row.
      key: of the whole run. A step uses `step_key`, so that nothing is kept between two steps.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree
    skipped: Int[Array, ""]
    streak: Int[Array, ""]
    key: Array

    def step_key(self) -> Array:
        """The key of this step."""
        return jax.random.fold_in(self.key, self.step)


def new_state(params: PyTree, opt_state: PyTree, key: Array, ema: bool = True) -> TrainState:
    """The state before the first step; its average is that of the parameters at the start."""

    def zero():  # one array a field: a donated buffer can be given only once
        return jnp.zeros((), jnp.int32)

    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(zero(), params, opt_state, average, zero(), zero(), key)


def on_mesh(
    init: Callable[[], TrainState], mesh: Mesh
) -> tuple[TrainState, Callable[[], TrainState]]:
    """Where each leaf of a state lives, by the rules of sharding.py.

    Args:
      init: makes the state from nothing; its leaves may be boxed with their logical axes, as
        `module.init` and an optimizer's `init` on such parameters give them.
      mesh: the devices.

    Returns:
      The abstract state, whose leaves have shape, dtype and sharding (what a restore needs), and a
      function that makes the state, every leaf on its devices from the start. Neither has boxes.
    """
    boxed = jax.eval_shape(init)
    shardings = sharding.shardings_for(boxed, mesh)

    def abstract(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    create = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)
    return jax.tree.map(abstract, nn.unbox(boxed), shardings), create


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no number of a tree is NaN or infinite; the whole numbers in it are not looked at."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves] or [jnp.array(True)]).all()


def keep_if(finite: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` where `finite` holds, else `old` to the bit; no branch, so it costs no wait."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def advance(state: TrainState, finite: Bool[Array, ""], **new: PyTree) -> TrainState:
    """The state after a step.

    Args:
      state: the one before.
      finite: whether the losses and the gradients' norms are finite.
      new: fields with what they become (params=..., opt_state=..., ema=...). They stay as they
        were, and the step counts as skipped, unless `finite` holds and the parameters are finite.
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
    """The moving average after a step whose new parameters are `params`.

    With `step`, the number of updates before this one, the decay warms up as
    min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten. A parameter that
    equals its average leaves it unchanged to the bit.
    """
    rate: Float[Array, ""] | float = 1 - decay
    if step is not None:
        rate = jnp.maximum(rate, 9 / (10 + step.astype(jnp.float32)))

    def follow(average, new):  # adding 0.0 would turn -0.0 into 0.0
        moved = average + (rate * (new - average)).astype(average.dtype)
        return jnp.where(new == average, average, moved)

    return jax.tree.map(follow, ema, params)
