"""The optimizers and learning-rate schedules that a config names."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from sana_jax.runtime.checks import positive
from sana_jax.runtime.errors import UserError
from sana_jax.training.optimizers.came import came
from sana_jax.training.optimizers.masks import (
    EVERYTHING,
    PyTree,
    decay_mask,
    map_with_name,
    trainable_mask,
)
from sana_jax.training.optimizers.per_layer import layer_counts, per_layer, with_axes


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule; the names are keys of OPTIMIZERS and SCHEDULES."""

    name: str = "adamw"
    learning_rate: float = 1e-4  # at the peak
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of the peak, left at the last step of a falling schedule
    beta1: float = 0.9
    beta2: float = 0.999  # Adafactor has a schedule of its own instead
    beta3: float = 0.9999  # of CAME's instability
    eps: float = 1e-8  # of Adam, also within Muon
    state_bits: int = 32  # 8 is possible for CAME's momentum
    weight_decay: float = 0.0
    clip_norm: float | None = None  # of the gradients of all trained parameters together

    def __post_init__(self):
        for field, table, name in (
            ("name", OPTIMIZERS, self.name),
            ("schedule", SCHEDULES, self.schedule),
        ):
            if name not in table:
                raise UserError(f"{field} {name!r} is unknown; there are {', '.join(table)}")
        positive("learning_rate", self.learning_rate)
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm)
        bits = self.state_bits
        if bits not in ([8, 32] if self.name == "came" else [32]):
            raise UserError(f"state_bits={bits}: give 32, or 8 with the optimizer came")


def make_optimizer(
    config: OptimizerConfig,
    params: PyTree,
    steps: int,
    trainable: Sequence[str] = EVERYTHING,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of `params`, and its learning rate as a function of the update.

    A frozen parameter has no state, is not decayed, does not count in the clipped norm, and stays
    as it is to the bit.

    Args:
      config: the optimizer and its schedule.
      params: a tree of arrays or shapes; boxed with their logical axes, if any is a stack of
        layers.
      steps: the updates of the whole training.
      trainable: regular expressions; a parameter is trained if one of them matches its whole
        "/"-joined path.

    Raises:
      UserError: the warm-up is longer than `steps`, or a pattern matches no parameter.
    """
    schedule = make_schedule(config, steps)
    mask = trainable_mask(params, trainable)
    layers = jax.tree.map(lambda train, count: count if train else 0, mask, layer_counts(params))
    parts = [
        optax.chain(
            OPTIMIZERS[config.name](config, layers),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    ]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    labels = jax.tree.map(lambda train: "train" if train else "freeze", mask)
    transforms = {"train": optax.chain(*parts), "freeze": optax.stateless(_stand_still)}
    return with_axes(optax.partition(transforms, labels)), schedule


def _stand_still(updates: PyTree, params: PyTree | None) -> PyTree:
    """Returns -0.0, which added leaves every number as it is; 0.0 would turn -0.0 into 0.0."""
    return jax.tree.map(lambda g: -jnp.zeros_like(g), updates)


def _adamw(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    # Adam works by element, so stacks need no per_layer.
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _adafactor(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    """Adafactor with momentum, without parameter scale (Zhai et al., arXiv 2106.04560, 3.4)."""
    tx = optax.adafactor(None, multiply_by_parameter_scale=False, momentum=config.beta1)
    return per_layer(optax.chain(tx, optax.scale(-1)), layers)


def _muon(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    """Muon with updates of Adam's size, for AdamW's rates (Liu et al., arXiv 2502.16982, 2.2)."""
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
    """Returns the axes that Muon makes orthogonal, of dense kernels and of whole filters.

    Fused projections are one matrix, as for CAME. Adam takes the rest: depthwise kernels are a few
    numbers for each channel, and rows of tables and of embeddings are vectors of their own.
    """

    def axes(name, x):
        if name.rpartition("/")[2] != "kernel" or x.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return map_with_name(axes, params)


def _came(config: OptimizerConfig, layers: PyTree) -> optax.GradientTransformation:
    tx = came(config.beta1, config.beta2, config.beta3, state_bits=config.state_bits)
    return per_layer(tx, layers)


# Name -> function of a config and each parameter's number of layers (per_layer.py), which makes the
# optimizer; its updates are scaled by the learning rate and subtracted.
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


# Name -> function of a config and the steps after the warm-up, which makes the schedule after it.
SCHEDULES = {"constant": _constant, "cosine": _cosine, "linear": _linear}


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate of update 0, 1, ...: linear warm-up, then the named schedule.

    Update k < warmup_steps has (k + 1) / warmup_steps of the peak, so that no update has rate 0.
    Raises UserError if the warm-up is longer than `steps`.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if not 0 <= warmup <= steps:
        raise UserError(f"warmup_steps={warmup}: give 0 to steps={steps}")
    after = SCHEDULES[config.schedule](config, steps - warmup)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def sqrt_scaled(learning_rate: float, batch: int, reference_batch: int) -> float:
    """Scales a rate stated for `reference_batch` to `batch`, by the root (Malladi et al. 2022)."""
    return learning_rate * (batch / reference_batch) ** 0.5
