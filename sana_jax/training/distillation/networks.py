"""Makes the task of a distillation from its config, and opens the checkpoints that it names."""

import dataclasses

from ml_collections import ConfigDict

from sana_jax.checkpoints.components import Checkpoint, module_for
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.training.distillation.recipe import read_distillation
from sana_jax.training.distillation.task import DistillationTask
from sana_jax.training.text_to_image.networks import Opener, frozen_dtype, make_networks
from sana_jax.training.text_to_image.recipe import read_recipe
from sana_jax.training.text_to_image.task import CaptionWindow


def teacher_of(student: SanaConfig) -> SanaConfig:
    """Returns the teacher's network, which does not know of guidance. Raises UserError."""
    if not student.is_sprint:
        raise UserError("config.network.guidance_embedding is missing: Sprint's is 0.1")
    return dataclasses.replace(student, guidance_embedding=None)


def make_task(config: ConfigDict, base: Checkpoint, captions: CaptionWindow) -> DistillationTask:
    """Returns the task of a config. Raises UserError, naming the key."""
    figures, teacher = read_distillation(config), teacher_of(base.dit)
    if figures.blocks[-1] >= teacher.depth:
        raise UserError(
            f"config.distillation.blocks={figures.blocks}: the teacher has {teacher.depth} blocks,"
            " from 0"
        )
    dit, *others = make_networks(config, base)
    module = module_for(teacher, config.dtype, frozen_dtype("dit", config.dtype))
    module = module.clone(remat=dit.remat, unroll=dit.unroll, implementation=dit.implementation)
    try:
        return DistillationTask(read_recipe(config), dit, module, *others, captions, figures)
    except UserError as error:
        raise UserError(f"config.recipe: {error}") from None


def open_network(config: ConfigDict, key: str, network: SanaConfig, opener: Opener) -> Checkpoint:
    """Opens the checkpoint that a key names. Raises UserError if it is not of `network`."""
    name = config[key]
    if not name:
        raise UserError(f"config.{key} is missing: name the checkpoint to distil")
    found = opener(name)
    if found.dit is None:
        raise UserError(f"config.{key}={name}: this checkpoint has no transformer")
    then, now = vars(found.dit), vars(network)
    if differing := [field for field in now if then[field] != now[field]]:
        raise UserError(
            f"config.{key}={name} is another network than config.network: "
            + ", ".join(f"{field} is {then[field]}, not {now[field]}" for field in differing)
        )
    return found
