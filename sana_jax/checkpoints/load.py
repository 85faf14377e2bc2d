"""Opens a checkpoint by its name, and reads its weights onto the devices of a mesh."""

import dataclasses
import re

import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import Checkpoint, component_dtype, place
from sana_jax.checkpoints.find import find
from sana_jax.models.layers import Dtype
from sana_jax.runtime.errors import UserError
from sana_jax.text.instruction import find_instruction

FLOAT16_WEIGHTS = re.compile(r"Sana_(600|1600)M_(?!.*BF16)")  # published names, see README


def open_checkpoint(
    name: str,
    variant: str | None = None,
    revision: str | None = None,
    instruction_file: str | None = None,
    clip_attention: bool | None = None,
    instruct: bool = True,
) -> Checkpoint:
    """Opens and checks the checkpoint called `name`; its weights stay unread. Raises UserError.

    `clip_attention`, if not None, replaces the transformer's own setting. With `instruct` the
    checkpoint gets its complex human instruction, and a warning says if none is found.
    """
    folder = find(name, revision, variant)
    given = find_instruction(instruction_file) if instruction_file else None
    if (folder / "model.json").is_file():
        if variant:
            raise UserError(f"{folder} is a native folder, which has no variants")
        checkpoint = native.open_folder(folder)
        checkpoint.instruction = given or checkpoint.instruction
    else:
        checkpoint = diffusers.open_folder(folder, variant)
        if checkpoint.text_encoder is None:
            return checkpoint
        checkpoint.instruction = given or find_instruction()
        if instruct and checkpoint.instruction is None:
            logging.warning(
                "No complex human instruction was found, which this checkpoint was trained with: "
                "pass --instruction_file, or install diffusers, for the pictures it is known for; "
                "where a command has no such flag, convert the checkpoint with it first."
            )
    if not instruct:
        checkpoint.instruction = None
    if checkpoint.instruction:
        found = checkpoint.instruction
        logging.info("instruction %s from %s", found.sha256[:12], found.source)
    if clip_attention is not None and checkpoint.dit is not None:
        checkpoint.dit = dataclasses.replace(checkpoint.dit, clip_attention=clip_attention)
    return checkpoint


def warn_of_float16(checkpoint: Checkpoint, name: str) -> None:
    """Warns if the weights were trained in float16 and nothing clips their attention."""
    made = checkpoint.provenance
    told = made.get("variant") == "fp16" or FLOAT16_WEIGHTS.search(str(made.get("source")))
    if told and checkpoint.dit is not None and checkpoint.dit.clip_attention is None:
        logging.warning(
            "%s was trained in float16, which clips its attention: take that as dtype, or set"
            " clip_attention, for the pictures it is known for",
            name,
        )


def load(name: str, dtype: Dtype, mesh: Mesh, **kwargs) -> Checkpoint:
    """Opens a checkpoint and places every weight on `mesh`, cast to `dtype`. Raises UserError.

    The keywords are those of `open_checkpoint`.
    """
    checkpoint = open_checkpoint(name, **kwargs)
    place_all(checkpoint, name, dtype, mesh)
    return checkpoint


def place_all(checkpoint: Checkpoint, name: str, dtype: Dtype, mesh: Mesh) -> None:
    """Reads the weights of an open checkpoint onto the devices of `mesh`, cast to `dtype`.

    Raises UserError, which begins with `name` and the component.
    """
    if jnp.dtype(dtype) != jnp.float16:
        warn_of_float16(checkpoint, name)
    for component, config in checkpoint.configs().items():
        logging.info("reading %s", component)
        params, narrow = checkpoint.params[component], component_dtype(component, dtype)
        try:
            checkpoint.params[component] = place(params, config, narrow, mesh)
        except UserError as error:  # it names a tensor, but not its file
            raise UserError(f"{name}, {component}: {error}") from None
