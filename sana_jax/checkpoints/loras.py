"""The LoRAs that a user names, each with a weight, and their merge into a checkpoint."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.find import file_sha256, find_lora
from sana_jax.checkpoints.mapping import cast
from sana_jax.checkpoints.peft import read_adapter
from sana_jax.checkpoints.smoothed import check_sites, is_smoothed
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.kernels.int8 import Quantised
from sana_jax.lora.adapter import attach, by_network, merge, site_names
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError

PyTree = Any
MAX_WEIGHT = 1000.0


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA that is read and checked; `adapter` is a tree of lora/adapter.py, on the host."""

    name: str  # as the user says it
    weight: float
    sha256: str  # of the file
    adapter: PyTree


def open_lora(name: str, weight: float, checkpoint: Checkpoint) -> Lora:
    """Reads the LoRA called `name`, a file, a folder or a hub id, for a checkpoint's networks.

    Raises UserError, and Retry if the hub does not answer.
    """
    weight = checks.number(f"the weight of {name}", weight, -MAX_WEIGHT, MAX_WEIGHT)
    file = find_lora(name)
    adapter = read_adapter(file, checkpoint.dit, checkpoint.text_encoder)
    if is_smoothed(checkpoint):
        check_sites(name, site_names(adapter))
    return Lora(str(name), weight, file_sha256(file), adapter)


def open_all(texts: Sequence[str], checkpoint: Checkpoint) -> list[Lora]:
    """Reads the LoRAs of a command line, each FILE or FILE:WEIGHT, for a checkpoint's networks.

    Raises UserError for a weight that is no number, and for a file that is named twice.
    """
    if texts and checkpoint.dit is None:
        raise UserError(f"--lora={texts[0]}: the checkpoint has no transformer to change")
    named = [split(text) for text in texts]
    files = [find_lora(name).resolve() for name, _ in named]
    for i, (name, _) in enumerate(named):
        if files[i] in files[:i]:
            raise UserError(f"--lora={name} is given twice: give it once, with the sum of weights")
    return [open_lora(name, weight, checkpoint) for name, weight in named]


def split(text: str) -> tuple[str, float]:
    """Returns the name and the weight of FILE[:WEIGHT]; the weight is 1.0 where it is left out."""
    name, colon, weight = text.rpartition(":")
    with contextlib.suppress(OSError):
        if Path(text).exists():  # a file with a colon in its name
            return text, 1.0
    if not colon or "/" in weight:
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise UserError(f"--lora={text}: the weight {weight!r} is no number") from None


def merge_into(checkpoint: Checkpoint, loras: Sequence[Lora]) -> Checkpoint:
    """Returns an opened checkpoint whose networks have the LoRAs in them; its provenance says so.

    The weights stay unread: each is read and changed when it is used, with float32 sums.
    """
    if not loras:
        return checkpoint
    pairs = pairs_of(loras)
    told = [
        {"name": Path(lora.name).name, "weight": lora.weight, "sha256": lora.sha256}
        for lora in loras
    ]
    return dataclasses.replace(
        checkpoint,
        params=checkpoint.params
        | {network: merge_lazily(checkpoint.params[network], pairs[network]) for network in pairs},
        provenance={**checkpoint.provenance, "loras": told},
    )


def pairs_of(loras: Sequence[Lora]) -> dict[str, list[tuple[PyTree, float]]]:
    """Returns what `attach` takes for each network that the LoRAs change."""
    pairs: dict[str, list[tuple[PyTree, float]]] = {}
    for lora in loras:
        for network, adapter in by_network(lora.adapter).items():
            pairs.setdefault(network, []).append((adapter, lora.weight))
    return pairs


def merge_lazily(params: PyTree, adapters: Iterable[tuple[PyTree, float]]) -> PyTree:
    """Returns a network's unread parameters with adapters and their weights in them, unread.

    Raises UserError for a kernel that is quantised.
    """
    return merge(attach(params, adapters), _updated)


def _updated(name: str, kernel: LazyArray | Quantised, lora: Mapping[str, Any]) -> LazyArray:
    if isinstance(kernel, Quantised):
        raise UserError(
            f"{name.lstrip('/')} is quantised, and a LoRA cannot be merged into it: merge it into"
            " the checkpoint that it was made from, or draw with it beside the weights, by --lora"
        )

    def load(dtype: np.dtype) -> np.ndarray:
        base = np.asarray(kernel)
        made = np.empty(base.shape, dtype)
        a, b = (np.asarray(lora[half], np.float32) for half in "ab")
        for i in np.ndindex(base.shape[:-2]):  # a layer at a time
            made[i] = cast(name, base[i].astype(np.float32) + a[i] @ b[i], dtype)
        return made

    return LazyArray(kernel.shape, kernel.dtype, load)
