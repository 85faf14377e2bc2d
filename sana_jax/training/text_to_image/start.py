"""Fills in what a config leaves to the checkpoint that it starts from, and to the devices.

A config's file calls `leave_open`; a training calls `resolve` before it reads anything else. A key
that is None is open, any other value stays. A run's checkpoints hold the values that were found, so
a run that goes on is compared by them.
"""

import dataclasses
import functools
import math
import operator
import typing

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict

from sana_jax import sharding
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.models.buckets import BASES
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.training.text_to_image.networks import Opener, open_once
from sana_jax.training.text_to_image.recipe import has_prior

BATCH = 4  # pictures of the data in a batch, or more where there are more devices

_OPEN = {
    "text_encoder.rows": int,
    "recipe.noise.shift": float,
    "recipe.batch_size": int,
    "recipe.microbatches": int,
    "dtype": str,
    "data.source": str,
    "data.buckets": bool,
    "images.prompts": tuple,  # (run.py)
}


def leave_open(config: ConfigDict) -> ConfigDict:
    """Leaves the keys that `resolve` can fill in open, and returns the config."""
    for field in dataclasses.fields(SanaConfig):
        kind = typing.get_origin(field.type)
        if kind is not tuple:  # else the type, or that of the union that is not None
            kind = next((k for k in typing.get_args(field.type) if k is not type(None)), field.type)
        config.network[field.name] = config_dict.placeholder(kind)
    for key, kind in _OPEN.items():
        *groups, name = key.split(".")
        functools.reduce(operator.getitem, groups, config)[name] = config_dict.placeholder(kind)
    return config


def resolve(config: ConfigDict, opener: Opener | None = None) -> ConfigDict:
    """Returns the config with its open keys filled in; the config that is given stays.

        network, text_encoder.rows, recipe.noise.shift     those of `start`
        autoencoder, text_encoder.checkpoint               `start` itself
        recipe.batch_size, .microbatches                   a picture on each device at a time
        dtype                                              bfloat16; float32 on a CPU
        data.buckets                                       where the size has buckets

    Raises UserError where `start`, or the data, is to be named.
    """
    config, opener = config.copy_and_resolve_references(), opener or open_once()
    is_open, encoder = config.network.get("depth") is None, config.text_encoder
    if is_open and not config.start:
        raise UserError("config.start is missing: name the checkpoint to train, such as shapes")
    if config.data.source is None:
        raise UserError("config.data.source is missing: name the folder of pictures")
    from_start = config.start and (
        is_open
        or None in (config.autoencoder, encoder.rows, config.recipe.noise.shift)
        or not (encoder.checkpoint or encoder.tokenizer)
    )
    if from_start:
        _follow(config, opener(config.start), is_open)
    if config.dtype is None:
        config.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if config.data.buckets is None:
        config.data.buckets = _has_buckets(config, opener)
    caption = config.data.caption
    if config.images.prompts is None and caption is not None and "{" not in caption:
        config.images.prompts = (caption,)
    if None in (config.recipe.batch_size, config.recipe.microbatches):
        _split_batch(config, sharding.make_mesh(**config.mesh, devices=jax.devices()))
    return config


def stand_in(config: ConfigDict, mesh: Mesh) -> ConfigDict:
    """Returns the config with its open keys filled in without a checkpoint, to compile its step.

    The networks are those of Sana 1.6B at 1024 px.
    """
    config = config.copy_and_resolve_references()
    if config.network.get("depth") is None:
        config.start = config.start or "Sana_1600M_1024px"  # a name, which nothing opens
        _follow(config, Checkpoint(DCAEConfig(), SanaConfig()), is_open=True)
    config.dtype, config.data.source = config.dtype or "bfloat16", config.data.source or "folder"
    _split_batch(config, mesh)
    return config


def _follow(config: ConfigDict, start: Checkpoint, is_open: bool) -> None:
    if is_open and start.dit is None:
        raise UserError(f"config.start={config.start}: this checkpoint has no transformer")
    if is_open:
        for name, value in vars(start.dit).items():
            if config.network[name] is None:
                config.network[name] = value
    config.autoencoder = config.autoencoder or config.start
    encoder = config.text_encoder
    if not encoder.tokenizer and not encoder.checkpoint and start.text_encoder is not None:
        encoder.checkpoint = config.start
    if encoder.rows is None:
        encoder.rows = start.text_rows
    if config.recipe.noise.shift is None:
        config.recipe.noise.shift = start.flow_shift


def _has_buckets(config: ConfigDict, opener: Opener) -> bool:
    if config.data.source == "shapes":  # which is square
        return False
    factor = opener(config.autoencoder).vae.factor
    return (config.data.size or config.network.sample_size * factor) in BASES


def _split_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Gives every device one picture at a time, and a batch at least BATCH of the data."""
    recipe, parts = config.recipe, sharding.batch_divisor(mesh)
    if recipe.batch_size is None and not has_prior(config):
        recipe.batch_size = -(-BATCH // parts) * parts
    elif recipe.batch_size is None:  # half of it is of the class
        even = math.lcm(parts, 2)
        recipe.batch_size = -(-2 * BATCH // even) * even
    if recipe.microbatches is None:
        recipe.microbatches = max(1, recipe.batch_size // (parts * recipe.encoder_microbatches))
