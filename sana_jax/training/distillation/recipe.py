"""The recipe of a distillation with its defaults, from which the files configs/sprint_* start."""

from ml_collections import ConfigDict, config_dict

from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.checks import as_group, read_group
from sana_jax.runtime.errors import UserError
from sana_jax.training.distillation.task import DistillationConfig
from sana_jax.training.text_to_image.recipe import text_to_image


def distillation(network: SanaConfig, steps: int, batch_size: int) -> ConfigDict:
    """Returns SANA-Sprint's recipe (arXiv 2503.09641 and its published config).

    `network` is the student's; the teacher, config.start, is the same without the embedding of the
    guidance scale. CAME at 2e-6 for both optimizers, 5,000 steps of warm-up, then constant;
    gradients clipped at 0.1; no captions dropped. `steps` are the student's and the
    discriminator's together.
    """
    config = text_to_image(network, steps, batch_size)
    config.auto_lr = "none"
    config.recipe.caption_dropout = 0.0
    config.recipe.optimizer.update(learning_rate=2e-6, warmup_steps=5000)
    config.distillation = as_group(DistillationConfig())
    config.distillation.discriminator = config.recipe.optimizer.copy_and_resolve_references()
    # A checkpoint of Sprint whose transformer is distilled further; none: it starts as the teacher.
    config.student = config_dict.placeholder(str)
    config.images.update(num_steps=2)
    return config


def read_distillation(config: ConfigDict) -> DistillationConfig:
    """Returns config.distillation. Raises UserError for figures that a distillation cannot have."""
    others = {
        "text_encoder.train": config.text_encoder.train,
        "lora.rank": config.lora.rank,
        "recipe.int8": config.recipe.int8,
        "recipe.follow_start": config.recipe.get("follow_start"),
    }
    for key, value in others.items():
        if value:
            raise UserError(
                f"config.{key}={value}: a distillation trains the transformer alone, all of it, in"
                " float"
            )
    if config.loop.evaluate_every:
        raise UserError(
            f"config.loop.evaluate_every={config.loop.evaluate_every}: a student has no held-out"
            " error; give 0, and draw with loop.images_every"
        )
    return read_group(DistillationConfig, config.distillation.to_dict(), "config.distillation")
