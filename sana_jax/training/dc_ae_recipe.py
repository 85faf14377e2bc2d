"""The phases of an autoencoder's training, as its config has them."""

from typing import Any

import jax

from sana_jax import sharding
from sana_jax.arguments import read_group
from sana_jax.errors import UserError
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training.autoencoder import Phase
from sana_jax.training.dc_ae_data import transform
from sana_jax.training.optimizers import make_schedule


def read_phase(fields: dict[str, Any], key: str = "config.phases.*") -> Phase:
    """A phase from its part of the config. Raises UserError, with `key` before the name."""
    return read_group(Phase, fields, key)


def check_phase(name: str, phase: Phase, network: DCAEConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for sizes that do not divide, and options that nothing knows."""
    key = f"config.phases.{name}"
    if phase.image_size % network.factor:
        raise UserError(
            f"{key}.image_size={phase.image_size}: it is a multiple of {network.factor}"
        )
    divisor = sharding.batch_divisor(mesh) * phase.microbatches
    if phase.batch_size < 1 or phase.batch_size % divisor:
        raise UserError(
            f"{key}.batch_size={phase.batch_size}: it is a multiple of {divisor}, the devices that"
            " split it times the microbatches"
        )
    try:
        transform(phase)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    for optimizer in ("autoencoder", "discriminator")[: 2 if phase.adversarial else 1]:
        try:
            make_schedule(getattr(phase, optimizer), phase.steps)
        except UserError as error:
            raise UserError(f"{key}.{optimizer}.{error}") from None
