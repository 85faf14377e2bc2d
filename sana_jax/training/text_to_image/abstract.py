"""A text-to-image training by shapes alone: its step, to be compiled ahead, and its FLOPs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.checkpoints.components import Checkpoint, abstract_placed
from sana_jax.data.sources import is_stored
from sana_jax.models import flops
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.text.prompts import TokenizedPrompts
from sana_jax.training.loop import compile_step
from sana_jax.training.state import on_mesh
from sana_jax.training.text_to_image.networks import READER, frozen_dtype, make_task, read_network
from sana_jax.training.text_to_image.recipe import has_prior
from sana_jax.training.text_to_image.task import Frozen, TextToImageTask

# About the length of SANA's instruction in Gemma's tokens; used only when compiling ahead.
INSTRUCTION_TOKENS = 240


def flops_of_row(task: TextToImageTask, size: int, images: bool, captions: bool) -> int:
    """Returns the FLOPs that a step needs for one image of `size` pixels per side.

    `images`, `captions`: whether the step encodes these; otherwise they are stored encoded.
    """
    side, rows = size // task.vae.config.factor, len(task.captions.window)
    count = task.passes * flops.trunk(task.dit.config, side, side, rows)
    if images:
        count += flops.encode(task.vae.config, size, size)
    if captions:
        told = len(task.captions.prefix)  # with an instruction, the first row is its own
        read = flops.text(task.text_encoder.config, rows - bool(told), told)
        # As for the transformer: a LoRA of it saves the gradients of its weights.
        count += (task.passes if task.reader_trains else 1) * read
    return round(count)


class AbstractTraining(NamedTuple):
    """A step to compile ahead, by step.lower(state, batch, *inputs) with the mesh set."""

    step: Any  # under jit
    state: Any  # ShapeDtypeStructs with shardings, as are the next two
    batch: Any
    inputs: tuple[Any, ...]
    size: int  # pixels a side
    flops: int  # of an image


def abstract_training(
    config: ConfigDict, mesh: Mesh, make: Callable[..., TextToImageTask] = make_task, turn: int = 0
) -> AbstractTraining:
    """Makes the step of a training, and the shapes of its arguments, without checkpoints.

    `make` makes the task of a config, the networks' configs and the captions; of its steps that
    take turns, this is number `turn`.

    Checkpoints that the config names are not opened: the autoencoder is SANA's, the text encoder is
    config.text_encoder.network, with an instruction as long as SANA's.
    """
    encoder, rows = config.text_encoder, config.text_encoder.rows
    base = Checkpoint(
        vae=DCAEConfig(),
        dit=read_network(SanaConfig, config, "network"),
        text_encoder=read_network(Gemma2Config, config, READER),
    )
    told = encoder.instruction and not encoder.train
    tokens = rows - 1 if told else rows
    none = np.zeros((1, rows), np.int32)
    empty = TokenizedPrompts((), none, np.arange(rows), none.astype(bool))
    prefix = (0,) * INSTRUCTION_TOKENS if told else ()
    window = np.maximum(np.arange(rows) - (rows - tokens), 0)
    captions = SimpleNamespace(prefix=prefix, window=window, empty=empty)
    task = make(config, base, captions)
    state, _ = on_mesh(lambda: task.init(jax.random.key(0)), mesh)

    def placed(shape, dtype):
        where = sharding.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((task.recipe.batch_size, *shape), dtype, sharding=where)

    side = size = config.data.size or base.dit.sample_size * base.vae.factor
    batch = {"tokens": placed((tokens,), jnp.int32), "mask": placed((rows,), jnp.bool_)}
    if has_prior(config):
        batch["weight"] = placed((), jnp.float32)
    if is_stored(config.data.source):
        side //= base.vae.factor
        batch["latents"] = placed((side, side, base.vae.latent_channels), jnp.float32)
    else:
        batch["image"] = placed((side, side, 3), jnp.uint8)
    vae = abstract_placed(base.vae, frozen_dtype("vae", config.dtype), mesh)
    frozen = Frozen(vae)
    if task.below is not None:
        dtype = frozen_dtype("dit", config.dtype, task.recipe.follow_start)
        below = abstract_placed(task.below, dtype, mesh)
        frozen = frozen._replace(dit=below)
    if not encoder.train:
        dtype = frozen_dtype("text_encoder", config.dtype)
        params = abstract_placed(base.text_encoder, dtype, mesh)
        everywhere = NamedSharding(mesh, P())
        constants = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            jax.eval_shape(task.read_constants, params),
        )
        prefix, null = (None, None) if task.reader_trains else constants
        frozen = frozen._replace(text_encoder=params, prefix=prefix, null=null)
    count = flops_of_row(task, size, "image" in batch, captions=True)
    step = compile_step(task.steps[turn], state)
    return AbstractTraining(step, state, batch, (frozen,), size, count)
