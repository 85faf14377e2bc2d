"""The recipe of a text-to-image training, as its config has it."""

import dataclasses

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.arguments import read_group
from sana_jax.errors import UserError
from sana_jax.training.optimizers import make_schedule, sqrt_scaled
from sana_jax.training.text_to_image import Recipe

AUTO_LR_BATCH = 256  # what learning rates are stated for, where config.auto_lr is "sqrt"


def read_recipe(config: ConfigDict) -> Recipe:
    """config.recipe, its learning rate as config.auto_lr says. Raises UserError."""
    recipe = read_group(Recipe, config.recipe.to_dict(), "config.recipe")
    optimizer = recipe.optimizer
    if config.auto_lr not in ("none", "sqrt"):
        raise UserError(f"config.auto_lr={config.auto_lr!r}: give none or sqrt")
    try:
        make_schedule(optimizer, recipe.steps)
    except UserError as error:
        raise UserError(f"config.recipe.optimizer.{error}") from None
    if config.auto_lr == "sqrt":
        rate = sqrt_scaled(optimizer.learning_rate, recipe.batch_size, AUTO_LR_BATCH)
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    return dataclasses.replace(recipe, optimizer=optimizer)


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where a batch does not split over the devices and into its parts."""
    recipe = config.recipe
    divisor = sharding.batch_divisor(mesh) * recipe.microbatches * recipe.encoder_microbatches
    for key in ("recipe", "evaluation")[: 2 if config.loop.evaluate_every else 1]:
        size = config[key].batch_size
        if size < 1 or size % divisor:
            raise UserError(
                f"config.{key}.batch_size={size}: it is a multiple of {divisor}, the devices that"
                " split it times the microbatches and the encoder's"
            )
