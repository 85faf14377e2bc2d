"""The distillation of Sana-Sprint, from a config to a model; see text_to_image/run.py."""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from sana_jax.checkpoints.components import place
from sana_jax.checkpoints.find import checkpoint_hash, find
from sana_jax.training.distillation.networks import make_task, open_network
from sana_jax.training.distillation.recipe import distillation, read_distillation
from sana_jax.training.distillation.task import DistillationTask
from sana_jax.training.state import TrainState
from sana_jax.training.text_to_image.networks import frozen_dtype, warn_of_mask
from sana_jax.training.text_to_image.run import TextToImageTraining
from sana_jax.training.text_to_image.task import Frozen


class DistillationTraining(TextToImageTraining):
    """A distillation made ready by its config. config.start is the teacher, which stays."""

    recipe = staticmethod(distillation)

    def __init__(self, config: ConfigDict, workdir: str):
        read_distillation(config)  # before any network is opened
        super().__init__(config, workdir)

    def _make_task(self) -> DistillationTask:
        task = make_task(self.config, self.base, self.captions)
        self.teacher = open_network(self.config, "start", task.below, self._opener)
        warn_of_mask(self.config, self.teacher)  # by which it is guided
        return task

    def _prints(self) -> dict[str, Any]:
        return super()._prints() | {"teacher": checkpoint_hash(find(self.config.start))}

    def _check_start(self) -> None:
        if self.config.student:
            open_network(self.config, "student", self.base.dit, self._opener)

    @cached_property
    def _frozen(self) -> Frozen:
        dtype = frozen_dtype("dit", self.config.dtype)
        teacher = place(self.teacher.params["dit"], self.teacher.dit, dtype, self.mesh)
        return super()._frozen._replace(dit=teacher)

    def _start(self, create) -> TrainState:
        """Returns the state of step 0: the student is the teacher, or what the config names."""
        state, config, found = create(), self.config, self.teacher
        if config.student:
            found = open_network(config, "student", self.base.dit, self._opener)
        weights = place(found.params["dit"], found.dit, "float32", self.mesh)
        student = traverse_util.flatten_dict(state.params["dit"])
        student = traverse_util.unflatten_dict(student | traverse_util.flatten_dict(weights))
        average = {"dit": jax.tree.map(jnp.copy, student)}
        return state.replace(params=state.params | {"dit": student}, ema=average)
