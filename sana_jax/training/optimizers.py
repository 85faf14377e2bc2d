"""Learning-rate schedules, optimizers and which parameters they train, by name."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.errors import UserError
from sana_jax.training.came import came
from sana_jax.training.per_layer import layer_counts, per_layer, with_axes

PyTree = Any

EVERYTHING = (".*",)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule; the names are keys of OPTIMIZERS and SCHEDULES."""

    name: str = "adamw"
    learning_rate: float = 1e-4  # at the peak
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of the peak, at the last step, where the schedule falls
    beta1: float = 0.9
    beta2: float = 0.999  # not of Adafactor, which has a schedule of its own
    beta3: float = 0.9999  # of CAME's instability
    eps: float = 1e-8  # of Adam, and where Muon uses it
    state_bits: int = 32  # 8: of CAME's momentum
    weight_decay: float = 0.0
    clip_norm: float | None = None  # global norm of the gradients of all that trains


def make_optimizer(
    config: OptimizerConfig,
    params: PyTree,
    steps: int,
    trainable: Sequence[str] = EVERYTHING,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of `params` and its learning rate by update.

    A frozen parameter has no state, is not decayed, does not count in the clipped norm, and stays
    as it is to the bit.

    Args:
      config: the optimizer.
      params: a tree of arrays or shapes; boxed with their logical axes, where any is a stack of
        layers.
      steps: of the whole training.
      trainable: regular expressions; a parameter whose "/"-joined path one of them matches whole
        is trained.

    Raises:
      UserError: for an unknown name, a bad figure, or a pattern that matches nothing.
    """
    schedule = make_schedule(config, steps)
    make = _named("optimizer", OPTIMIZERS, config.name)
    if config.state_bits not in ([8, 32] if config.name == "came" else [32]):
        raise UserError(f"state_bits={config.state_bits}: give 32, or 8 with the optimizer came")
    mask = trainable_mask(params, trainable)
    layers = jax.tree.map(lambda train, count: count if train else 0, mask, layer_counts(params))
    parts = [
        optax.chain(
            make(config, layers),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(_positive("clip_norm", config.clip_norm)))
    labels = jax.tree.map(lambda train: "train" if train else "freeze", mask)
    transforms = {"train": optax.chain(*parts), "freeze": optax.stateless(_stand_still)}
    return with_axes(optax.partition(transforms, labels)), schedule


def _stand_still(updates: PyTree, params: PyTree | None) -> PyTree:
    """-0.0, which leaves every number as it is when added; 0.0 turns -0.0 into 0.0."""
    return jax.tree.map(lambda g: -jnp.zeros_like(g), updates)


def _adamw(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)  # by number: a stack is fine


def _adafactor(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    """With momentum and without parameter scale (Zhai et al., arXiv 2106.04560, section 3.4)."""
    tx = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=config.beta1)
    return per_layer(optax.chain(tx, optax.scale(-1)), layers)


def _muon(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    """Its updates have Adam's size (Liu et al., arXiv 2502.16982, section 2.2): AdamW's rates."""
    tx = optax.contrib.muon(
        -1.0,
        beta=config.beta1,
        eps=config.eps,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=_muon_axes,
        consistent_rms=0.2,
    )
    return per_layer(tx, layers)


def _muon_axes(params: PyTree) -> PyTree:
    """What Muon makes orthogonal: dense kernels and whole filters, (all inputs, outputs).

    Fused projections are one matrix, as CAME has them. Adam takes the rest: depthwise kernels are
    a few numbers for each channel, rows of tables and of embeddings are vectors of their own.
    """

    def axes(name, x):
        if name.rpartition("/")[2] != "kernel" or x.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return _map_with_name(axes, params)


def _came(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    tx = came(config.beta1, config.beta2, config.beta3, state_bits=config.state_bits)
    return per_layer(tx, layers)


# Name -> what makes, of a config and the number of layers in each parameter (per_layer.py), the
# direction that is scaled by the learning rate and subtracted.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "muon": _muon,
    "came": _came,
}


def _constant(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


def _cosine(config: OptimizerConfig, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, max(steps, 1), config.final_fraction)


def _linear(config: OptimizerConfig, steps: int) -> optax.Schedule:
    final = config.learning_rate * config.final_fraction
    return optax.linear_schedule(config.learning_rate, final, max(steps, 1))


# Name -> what follows the warm-up, of a config and the number of steps left.
SCHEDULES = {"constant": _constant, "cosine": _cosine, "linear": _linear}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of update 0, 1, ...: linear warm-up to the peak, then the named schedule.

    Update k < warmup_steps has (k + 1) / warmup_steps of the peak, so that no update is lost.
    """
    after = _named("schedule", SCHEDULES, config.schedule)
    peak, warmup = _positive("learning_rate", config.learning_rate), config.warmup_steps
    if not 0 <= warmup <= steps:
        raise UserError(f"warmup_steps={warmup}: give 0 to steps={steps}")
    after = after(config, steps - warmup)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def sqrt_scaled(learning_rate: float, batch: int, reference_batch: int) -> float:
    """A rate stated for a batch of `reference_batch`, for one of `batch` (Malladi et al. 2022)."""
    return learning_rate * (batch / reference_batch) ** 0.5


def decay_mask(params: PyTree) -> PyTree:
    """True for matrices and filters; norms, biases, tables and embeddings are not decayed."""
    return _map_with_name(lambda name, _: name.endswith("kernel"), params)


def trainable_mask(params: PyTree, patterns: Sequence[str]) -> PyTree:
    """True where a pattern matches the whole path. Raises UserError for one that never does."""
    unmatched = set(patterns)

    def trains(name, _):
        matching = {pattern for pattern in patterns if _matches(pattern, name)}
        unmatched.difference_update(matching)
        return bool(matching)

    mask = _map_with_name(trains, params)
    if unmatched:
        names = []
        _map_with_name(lambda name, _: names.append(name), params)
        raise UserError(
            f"trainable pattern {min(unmatched)!r} matches no parameter; paths are as {names[0]!r}"
        )
    return mask


def stop_frozen(params: PyTree, mask: PyTree) -> PyTree:
    """Cuts the gradients of what the mask freezes, so that they are not even computed."""
    return jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, mask)


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


def _map_with_name(function: Callable[[str, Any], Any], params: PyTree) -> PyTree:
    """Maps over parameters with their "/"-joined paths; a boxed one is one leaf."""

    def is_leaf(x):
        return isinstance(x, nn.meta.AxisMetadata | optax.MaskedNode)

    def call(path, leaf):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(call, params, is_leaf=is_leaf)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"trainable pattern {pattern!r}: {error}") from None


def _named(kind: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise UserError(f"{kind} {name!r} is unknown; there are {', '.join(table)}")
    return table[name]


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={value}: give a positive number")
    return value
