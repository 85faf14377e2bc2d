"""The result of a text-to-image training: a whole checkpoint, or the file of its LoRA."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.find import LORA
from sana_jax.checkpoints.loras import merge_lazily
from sana_jax.checkpoints.mapping import cast
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.checkpoints.tensors import LazyArray, TensorReader
from sana_jax.lora.adapter import by_network
from sana_jax.lora.config import LoraConfig
from sana_jax.runtime import hosts
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import parse_json, read_json, replace_folder, storage
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.session import export
from sana_jax.training.text_to_image.networks import open_base, read_lora

MADE = "sana_jax"  # the key of a LoRA's metadata that has its provenance


def open_workdir(
    workdir: str | epath.Path, ema: bool = True, rest: str | None = None
) -> Checkpoint:
    """Returns the model of a training's newest whole checkpoint, with its LoRA merged.

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
        if "lora" in trained:
            settings["start"] = rest
    if settings["recipe"].pop("follow_start", False):  # that start is no part of the model
        prints.pop("start")
    try:
        base, now = open_base(ConfigDict(settings))
    except UserError as error:
        if rest:
            raise
        raise UserError(f"{error}; --rest says where it is now") from error
    for name in prints:
        if now.get(name) != prints[name]:
            raise UserError(f"config.{name} of {workdir} is not what it was in the training")
    if "lora" in trained:
        scale = read_lora(ConfigDict(settings)).scale
        for network, adapter in by_network(trained.pop("lora")).items():
            trained[network] = merge_lazily(base.params[network], [(adapter, scale)])
    return complete(base, jax.tree_util.tree_map_with_path(lazy, trained), document["step"], ema)


def complete(base: Checkpoint, trained: Any, step: int, ema: bool) -> Checkpoint:
    """Returns `base` with the trained weights, and a provenance that says so."""
    provenance = {"trained": True, "steps": int(step), "ema": ema, **base.provenance}
    return dataclasses.replace(base, params={**base.params, **trained}, provenance=provenance)


def write(base: Checkpoint, trained: Any, step: int, lora: LoraConfig, folder: Path) -> None:
    """Writes the moving average `trained`, which every host holds in full; collective.

    Raises Retry on all hosts where the folder cannot be written.
    """
    model = complete(base, trained, step, ema=True)
    if "lora" not in trained:
        export(model, folder)
        return

    def write_lora() -> None:
        about = {MADE: json.dumps(model.provenance, sort_keys=True)}
        with storage(folder), replace_folder(folder) as part:
            file = part / LORA
            given = base.dit, lora.alpha, about, base.text_encoder
            write_adapter(file, trained["lora"], *given)

    hosts.on_first_host(write_lora)


def steps_of(folder: Path) -> int | None:
    """Returns after how many steps a result was written; None where none is whole."""
    if (folder / LORA).is_file():
        made = _made(folder / LORA)
    elif native.is_whole(folder):
        made = read_json(folder / "model.json").get("provenance")
    else:
        return None
    return made.get("steps") if isinstance(made, dict) else None


def _made(file: Path) -> Any:
    """Returns the provenance in a LoRA's file; None where the file is damaged or another's."""
    try:
        return parse_json(TensorReader(file).metadata.get(MADE, "null"))
    except (OSError, ValueError):  # a UserError is one
        return None


def lazy(path: tuple, array: np.ndarray | LazyArray) -> np.ndarray | LazyArray:
    """Returns an array as one that is read when it is used, as those of an opened folder are."""
    if isinstance(array, LazyArray):
        return array
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return LazyArray(array.shape, array.dtype, partial(cast, name, array))
