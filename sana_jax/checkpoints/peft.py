"""Reads and writes LoRA files as diffusers does: pytorch_lora_weights.safetensors.

Module NAME of diffusers' transformer has the tensors transformer.NAME.lora_A.weight, (rank, in),
and lora_B.weight, (out, rank); those of 1x1 convolutions have two axes of one more, and A of the
patch embedding is a convolution of patches. The module's weight becomes W + weight * alpha / rank
* B A.

The header's `lora_adapter_metadata` has the fields of peft's LoraConfig, each after "transformer.".
`rank_pattern` and `alpha_pattern` there give modules other values than `r` and `lora_alpha`; of the
patterns that match a module the first one counts. Patterns are sorted when a file is written, so we
write whole names, of which only one matches. Without metadata alpha is the rank, so that B A counts
once; every file of ours says both.
"""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from einops import rearrange
from etils import epath
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints.diffusers_names import dit_entries
from sana_jax.checkpoints.mapping import LINEAR, POINTWISE
from sana_jax.checkpoints.tensors import on_host
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import write_atomically

PyTree = Any
METADATA = "lora_adapter_metadata"
ABSENT_ALPHA = {"absent_alpha": "rank"}  # of a file's header, for people


class Module(NamedTuple):
    """A matrix of the published layout: its site in lora/adapter.py, and how its axes move."""

    site: str
    layer: int | tuple[()]  # the index in the site's arrays; () if they have no layers
    pattern: str  # of the weight, and of A, whose outputs are the ranks
    sizes: dict[str, int]

    @property
    def pattern_b(self) -> str:
        return LINEAR if self.pattern == LINEAR else POINTWISE


def modules(config: SanaConfig) -> dict[str, Module]:
    """Returns the modules that a LoRA can change, by their names in diffusers' transformer."""
    found = {}
    for entry in dit_entries(config):
        path, _, leaf = entry.path.rpartition("/")
        if leaf != "kernel":
            continue
        parent, _, layer = path.rpartition("/")
        # Several tensors are the projections of a fused layer, whose name has a letter for each.
        names = [f"{parent}/{letter}" for letter in layer] if entry.names[1:] else [path]
        for i, theirs in enumerate(entry.layer_names()):
            index = () if entry.layers is None else i
            for site, name in zip(names, theirs, strict=True):
                module = Module(site, index, entry.pattern, dict(entry.sizes))
                found[name.removesuffix(".weight")] = module
    return found


def write_adapter(
    path: Path,
    adapter: PyTree,
    config: SanaConfig,
    alpha: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter of lora/adapter.py to a file that diffusers loads; dtypes stay.

    Args:
      path: the file. It exists completely or not at all.
      adapter: a tree of sites; of one with a "scale" alpha is that times its rank.
      alpha: of all other sites; None: the rank.
      metadata: further entries of the file's header, such as the base's name.

    Raises UserError for a site that the published layout does not have, and OSError.
    """
    flat = traverse_util.flatten_dict(nn.unbox(adapter), sep="/")
    tensors, ranks, alphas = {}, {}, {}
    known = modules(config)
    if unknown := {n.rpartition("/")[0] for n in flat} - {module.site for module in known.values()}:
        raise UserError(f"a LoRA of {min(unknown)}: diffusers' transformer has no such matrix")
    flat = {name: on_host(array) for name, array in flat.items()}
    for name, module in known.items():
        if f"{module.site}/a" not in flat:
            continue
        a, b = (flat[f"{module.site}/{half}"][module.layer] for half in "ab")
        ranks[name] = rank = a.shape[-1]
        alphas[name] = _number(rank if alpha is None else alpha)
        if (scale := flat.get(f"{module.site}/scale")) is not None:
            alphas[name] = _number(rank * float(scale[module.layer] if scale.ndim else scale))
        for key, array, pattern in ("A", a, module.pattern), ("B", b, module.pattern_b):
            left, right = pattern.split("->")
            array = rearrange(array, f"{right} -> {left}", **module.sizes if key == "A" else {})
            tensors[f"transformer.{name}.lora_{key}.weight"] = np.ascontiguousarray(array)
    fields = {"target_modules": list(ranks)}
    for one, pattern, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", alphas),
    ):
        fields[one] = usual = collections.Counter(values.values()).most_common(1)[0][0]
        fields[pattern] = {name: value for name, value in values.items() if value != usual}
    told = {f"transformer.{name}": value for name, value in fields.items()}
    header = {"format": "pt", METADATA: json.dumps(told, indent=2, sort_keys=True)} | ABSENT_ALPHA
    header |= {name: str(value) for name, value in (metadata or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(epath.Path(path), safetensors.numpy.save(tensors, metadata=header))


def _number(value: float) -> float:
    """Returns a whole number as one, as people write alphas."""
    return int(value) if float(value).is_integer() else float(value)
