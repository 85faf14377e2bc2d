"""The checkpoint that a text-to-image training results in."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.mapping import cast
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.runtime.errors import UserError
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.text_to_image.networks import open_base


def open_workdir(
    workdir: str | epath.Path, ema: bool = True, rest: str | None = None
) -> Checkpoint:
    """Returns the model of a training's newest whole checkpoint.

    Args:
      workdir: the folder of the training.
      ema: take the moving average of the trained weights; else the weights themselves.
      rest: the checkpoint of the networks that did not train, by default where the config says.

    Raises:
      UserError: there is no such training or checkpoint, or a network that did not train is not
        what it was in the training.
      Retry: the storage does not answer.
    """
    document, trained = read_newest(workdir, "ema" if ema else "params")
    settings = document["config"]
    if "fingerprints" not in settings:
        raise UserError(f"{workdir} is no text-to-image training")
    prints = settings.pop("fingerprints")
    if rest:
        settings["autoencoder"] = rest
        if settings["text_encoder"]["checkpoint"]:
            settings["text_encoder"]["checkpoint"] = rest
    try:
        base, now = open_base(ConfigDict(settings))
    except UserError as error:
        if rest:
            raise
        raise UserError(f"{error}; --rest says where it is now") from error
    for name in prints:
        if now.get(name) != prints[name]:
            raise UserError(f"config.{name} of {workdir} is not what it was in the training")
    return complete(base, jax.tree_util.tree_map_with_path(_lazy, trained), document["step"], ema)


def complete(base: Checkpoint, trained: Any, step: int, ema: bool) -> Checkpoint:
    """Returns `base` with the trained weights, and a provenance that says so."""
    provenance = {"trained": True, "steps": int(step), "ema": ema, **base.provenance}
    return dataclasses.replace(base, params={**base.params, **trained}, provenance=provenance)


def _lazy(path: tuple, array: np.ndarray) -> LazyArray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return LazyArray(array.shape, array.dtype, partial(cast, name, array))
