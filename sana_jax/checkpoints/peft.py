"""Reads and writes LoRA files as diffusers does: pytorch_lora_weights.safetensors.

Module NAME of diffusers' transformer has the tensors transformer.NAME.lora_A.weight, (rank, in),
and lora_B.weight, (out, rank); those of 1x1 convolutions have two axes of one more, and A of the
patch embedding is a convolution of patches. The module's weight becomes W + weight * alpha / rank
* B A. Modules of the text encoder, transformers' Gemma2Model, are text_encoder.NAME, which
diffusers leaves unread: its Sana pipelines give LoRAs to the transformer alone.

The header's `lora_adapter_metadata` has the fields of peft's LoraConfig, each after "transformer."
or "text_encoder.".
`rank_pattern` and `alpha_pattern` there give modules other values than `r` and `lora_alpha`; of the
patterns that match a module the first one counts. Patterns are sorted when a file is written, so we
write whole names, of which only one matches. Without metadata alpha is the rank, so that B A counts
once; every file of ours says both.

Read are these files, others of peft's whose adapter_config.json is beside them, and those with the
keys of kohya and ComfyUI (lora_unet_NAME.lora_down.weight, lora_up.weight, alpha) where the name is
that of a module.
"""

import collections
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex  # as re, with a limit of time
import safetensors.numpy
from einops import rearrange
from etils import epath
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints.components import abstract_params
from sana_jax.checkpoints.diffusers_names import entries
from sana_jax.checkpoints.mapping import LINEAR, POINTWISE, cast
from sana_jax.checkpoints.tensors import FLOAT_DTYPES, TensorReader, on_host
from sana_jax.lora.adapter import TEXT_ENCODER, sites, with_text_encoder
from sana_jax.lora.config import MAX_RANK
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import parse_json, read_json, write_atomically

PyTree = Any
METADATA = "lora_adapter_metadata"
ABSENT_ALPHA = {"absent_alpha": "rank"}  # of a file's header, for people
MAX_ALPHA = 2.0**20
MATCH_SECONDS = 1.0  # for a pattern of a file that may come from anywhere
TRANSFORMER = "transformer"  # of names; TEXT_ENCODER is the other network's
PEFT = "base_model.model."  # of the names in files of peft's own, which have no metadata
PREFIXES = "transformer.", "diffusion_model.", PEFT, "lora_unet_", "lora_transformer_"
# The ends of the tensors' names, and the part of a LoRA that each of them is.
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".alpha": "alpha",
}
# Other things that files of LoRA hold, by what their names have.
REFUSED = {
    r"dora_scale|lora_magnitude_vector": "DoRA, which is not supported",
    r"^lora_te": "a text encoder, under the names of kohya, which are not read",
    r"conv_depth\.": "a depthwise convolution, which takes no LoRA",
}
# Fields of peft's LoraConfig that make the update another one, and not by a tensor of their own.
VARIANTS = {"use_dora": "DoRA", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA"}
VARIANTS |= {"kasa_config": "KaSA", "arrow_config": "Arrow", "alora_invocation_tokens": "aLoRA"}
CHANGES_BASE = "pissa", "olora", "corda", "loftq", "lora_ga"  # values of init_lora_weights


class Module(NamedTuple):
    """A matrix of the published layout: its site in lora/adapter.py, and how its axes move."""

    site: str
    layer: int | tuple[()]  # the index in the site's arrays; () if they have no layers
    pattern: str  # of the weight, and of A, whose outputs are the ranks
    sizes: dict[str, int]

    @property
    def patterns(self) -> dict[str, tuple[str, dict[str, int]]]:
        """The einops pattern and the sizes of both halves, "theirs -> ours"."""
        pattern_b = LINEAR if self.pattern == LINEAR else POINTWISE
        return {"a": (self.pattern, self.sizes), "b": (pattern_b, {})}

    def theirs(self, half: str, ours: np.ndarray) -> np.ndarray:
        """Returns our half, "a" (in, rank) or "b" (rank, out), in the layout of the file."""
        pattern, sizes = self.patterns[half]
        left, right = pattern.split("->")
        return rearrange(ours, f"{right} -> {left}", **sizes)

    def ours(self, half: str, theirs: np.ndarray) -> np.ndarray:
        """Returns our half from that of the file."""
        pattern, sizes = self.patterns[half]
        return rearrange(theirs, pattern, **sizes)


def modules(config: SanaConfig, text_encoder: Gemma2Config | None = None) -> dict[str, Module]:
    """Returns the modules that a LoRA can change, by their names in a file of diffusers'."""
    found = {}
    tables = [(TRANSFORMER, "", entries(config))]
    if text_encoder:
        tables.append((TEXT_ENCODER, f"{TEXT_ENCODER}/", entries(text_encoder)))
    for network, branch, table in tables:
        for entry in table:
            path, _, leaf = entry.path.rpartition("/")
            if leaf != "kernel":
                continue
            parent, _, layer = path.rpartition("/")
            # Several tensors are the projections of a fused layer, named by its letters.
            names = [f"{parent}/{letter}" for letter in layer] if entry.names[1:] else [path]
            for i, theirs in enumerate(entry.layer_names()):
                index = () if entry.layers is None else i
                for site, name in zip(names, theirs, strict=True):
                    module = Module(branch + site, index, entry.pattern, dict(entry.sizes))
                    found[f"{network}.{name.removesuffix('.weight')}"] = module
    return found


def write_adapter(
    path: Path,
    adapter: PyTree,
    config: SanaConfig,
    alpha: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    text_encoder: Gemma2Config | None = None,
) -> None:
    """Writes an adapter of lora/adapter.py to a file that diffusers loads; dtypes stay.

    Args:
      path: the file. It exists completely or not at all.
      adapter: a tree of sites; of one with a "scale" alpha is that times its rank.
      alpha: of all other sites; None: the rank.
      metadata: further entries of the file's header, such as the base's name.
      text_encoder: the text encoder, if the adapter has sites of it.

    Raises UserError for a site that the published layout does not have, and OSError.
    """
    flat = traverse_util.flatten_dict(nn.unbox(adapter), sep="/")
    tensors, ranks, alphas = {}, {}, {}
    known = modules(config, text_encoder)
    if unknown := {n.rpartition("/")[0] for n in flat} - {module.site for module in known.values()}:
        raise UserError(f"a LoRA of {min(unknown)}: diffusers' networks have no such matrix")
    flat = {name: on_host(array) for name, array in flat.items()}
    for name, module in known.items():
        if f"{module.site}/a" not in flat:
            continue
        a, b = (flat[f"{module.site}/{half}"][module.layer] for half in "ab")
        ranks[name] = rank = a.shape[-1]
        alphas[name] = _number(rank if alpha is None else alpha)
        if (scale := flat.get(f"{module.site}/scale")) is not None:
            alphas[name] = _number(rank * float(scale[module.layer] if scale.ndim else scale))
        for half, array in ("a", a), ("b", b):
            key = f"{name}.lora_{half.upper()}.weight"
            tensors[key] = np.ascontiguousarray(module.theirs(half, array))
    told = _told(TRANSFORMER, ranks, alphas) | _told(TEXT_ENCODER, ranks, alphas)
    header = {"format": "pt", METADATA: json.dumps(told, indent=2, sort_keys=True)} | ABSENT_ALPHA
    header |= {name: str(value) for name, value in (metadata or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(epath.Path(path), safetensors.numpy.save(tensors, metadata=header))


def _told(network: str, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """Returns the fields of peft's LoraConfig for the modules of one network."""
    names = [name for name in ranks if name.startswith(f"{network}.")]
    if not names:
        return {}
    short = {name: name.removeprefix(f"{network}.") for name in names}
    fields: dict[str, Any] = {"target_modules": list(short.values())}
    for one, pattern, values in (
        ("r", "rank_pattern", ranks),
        ("lora_alpha", "alpha_pattern", alphas),
    ):
        usual = collections.Counter(values[name] for name in names).most_common(1)[0][0]
        fields[one] = usual
        fields[pattern] = {short[name]: values[name] for name in names if values[name] != usual}
    return {f"{network}.{name}": value for name, value in fields.items()}


def _number(value: float) -> float:
    """Returns a whole number as one, as people write alphas."""
    return int(value) if float(value).is_integer() else float(value)


def read_adapter(
    path: Path, config: SanaConfig, text_encoder: Gemma2Config | None = None
) -> PyTree:
    """Reads an adapter for the networks of these configs: a tree of lora/adapter.py in float32.

    Layers of other ranks are filled up with zeros, those without an update are zeros; every layer
    has a scale. Raises UserError if the file holds anything but a whole LoRA of these networks.
    """
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserError(f"{path}: pickled LoRAs are not read: save it as safetensors")
    tensors, known = TensorReader(path), modules(config, text_encoder)
    parts, prefix = _parts(path, tensors, known)
    fields = _fields(path, prefix, tensors.metadata)
    if any(fields.values()) and (
        keys := [part["alpha"] for part in parts.values() if "alpha" in part]
    ):
        raise UserError(f"{path}: alpha is said twice, by {METADATA} and by {keys[0]}")
    boxes = abstract_params(config)
    if text_encoder:
        boxes = with_text_encoder(boxes, abstract_params(text_encoder))
    shapes, flat = sites(boxes), {}
    ranks: dict[str, int] = collections.defaultdict(int)
    for name, part in parts.items():
        rank = _check(path, tensors, part, known[name], shapes[known[name].site][0])
        ranks[known[name].site] = max(rank, ranks[known[name].site])
    for site, rank in ranks.items():
        (*layers, inputs, outputs), _ = shapes[site]
        flat[f"{site}/a"] = np.zeros((*layers, inputs, rank), np.float32)
        flat[f"{site}/b"] = np.zeros((*layers, rank, outputs), np.float32)
        flat[f"{site}/scale"] = np.ones(layers)
    for name, part in parts.items():
        module = known[name]
        values = {end: cast(f"{path}: {key}", tensors[key], "float32") for end, key in part.items()}
        a, b = (module.ours(half, values[half]) for half in "ab")
        rank = len(b)
        alpha = values["alpha"].item() if "alpha" in values else rank
        network, _, short = name.partition(".")
        told = fields[network]
        scale = _scale(path, told, short, rank) if told else alpha / rank
        flat[f"{module.site}/a"][module.layer][:, :rank] = a
        flat[f"{module.site}/b"][module.layer][:rank] = b
        flat[f"{module.site}/scale"][module.layer] = scale
    return traverse_util.unflatten_dict(flat, sep="/")


def _parts(
    path: Path, tensors: TensorReader, known: Mapping[str, Module]
) -> tuple[dict[str, dict[str, str]], str]:
    """Returns module -> part -> name of the tensor, and the prefix of all names."""
    names = sorted(tensors)
    if not any("lora" in name.lower() for name in names):
        raise UserError(f"{path} holds no LoRA, but {', '.join(names[:3]) or 'nothing'}")
    own = [name for name in names if not name.startswith(f"{TEXT_ENCODER}.")]
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in own)), "")
    known_names = [name.removeprefix(f"{TRANSFORMER}.") for name in known]
    spelt = {n.replace(".", "_"): n for n in known_names} if prefix[-1:] == "_" else {}
    parts: dict[str, dict[str, str]] = {}
    for pattern, what in REFUSED.items():
        if found := [name for name in names if re.search(pattern, name)]:
            raise UserError(f"{path}: {found[0]} is of {what}")
    for key in names:
        end = next((end for end in PARTS if key.endswith(end)), None)
        if end is None:
            raise UserError(f"{path}: {key} is no part of a LoRA that can be read")
        name = key.removesuffix(end)
        if key in own:
            name = name.removeprefix(prefix)
            name = f"{TRANSFORMER}.{spelt.get(name, name)}"
        if name not in known:
            network = TRANSFORMER if key in own else "checkpoint's text encoder"
            raise UserError(
                f"{path}: {key} belongs to no matrix of this {network}: it is a LoRA of another"
                " network, or of a layout that is not read"
            )
        if PARTS[end] in parts.setdefault(name, {}):
            raise UserError(f"{path} holds {key} twice: as {parts[name][PARTS[end]]} too")
        parts[name][PARTS[end]] = key
    for part in parts.values():
        if missing := {"a", "b"} - part.keys():
            half = f"lora_{min(missing).upper()}"
            raise UserError(f"{path}: {min(part.values())} lacks its other half, {half}")
    return parts, prefix


def _check(
    path: Path, tensors: TensorReader, part: dict[str, str], module: Module, shape: tuple[int, ...]
) -> int:
    """Returns the rank of a module's tensors, whose shapes and types are right."""
    rank = (*tensors.shape(part["a"]), 0)[0]
    if not 0 < rank <= MAX_RANK:
        raise UserError(f"{path}: {part['a']} is of rank {rank}: there is none")
    sides = {"a": (shape[-2], rank), "b": (rank, shape[-1])}
    for half, ours in sides.items():
        key = part[half]
        wanted = module.theirs(half, np.broadcast_to(np.zeros((), np.int8), ours)).shape
        if tensors.shape(key) != wanted:
            raise UserError(
                f"{path}: {key} is {list(tensors.shape(key))} instead of {list(wanted)}: it is a"
                " LoRA of another network"
            )
    for key in part.values():
        if tensors.dtype(key) not in FLOAT_DTYPES:
            raise UserError(f"{path}: {key} is {tensors.dtype(key)}; floating point is needed")
    if "alpha" in part and math.prod(tensors.shape(part["alpha"])) != 1:
        raise UserError(f"{path}: {part['alpha']} is no single number")
    return rank


def _fields(path: Path, prefix: str, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the fields of peft's LoraConfig for each network, none without metadata."""
    fields: dict[str, dict[str, Any]] = {TRANSFORMER: {}, TEXT_ENCODER: {}}
    if prefix == PEFT:
        fields[TRANSFORMER] = read_json(path.parent / "adapter_config.json")
    else:
        try:
            told = parse_json(metadata.get(METADATA) or "{}")
        except ValueError as error:
            raise UserError(f"{path}: its {METADATA} is not JSON ({error})") from None
        if not isinstance(told, dict):
            raise UserError(f"{path}: its {METADATA} is no JSON object")
        for name, value in told.items():
            start = f"{TEXT_ENCODER}." if name.startswith(f"{TEXT_ENCODER}.") else prefix
            if not name.startswith(start):
                raise UserError(f"{path}: {name} of its {METADATA} is not of {prefix}NAME")
            network = TRANSFORMER if start == prefix else TEXT_ENCODER
            fields[network][name.removeprefix(start)] = value
    for told in fields.values():
        for name, what in VARIANTS.items():
            if told.get(name):
                raise UserError(f"{path} is of {what} ({name}), which is not supported")
        start = told.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            raise UserError(
                f"{path} began as {start}, which changes the base: convert it to a LoRA"
            )
    return fields


def _scale(path: Path, fields: Mapping[str, Any], name: str, rank: int) -> float:
    """Returns the factor of a module's update by peft's metadata."""
    said = _by_pattern(path, fields, "rank_pattern", name, fields.get("r", 8))
    if said != rank:
        raise UserError(
            f"{path}: {name} is of rank {rank}, but of {said!r} by the file's {METADATA}, where the"
            " first pattern that matches counts"
        )
    alpha = _by_pattern(path, fields, "alpha_pattern", name, fields.get("lora_alpha", 8))
    alpha = checks.number(f"{path}: lora_alpha", alpha, -MAX_ALPHA, MAX_ALPHA)
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _by_pattern(path: Path, fields: Mapping[str, Any], key: str, name: str, usual: Any) -> Any:
    """Returns a module's own value, or the usual one, as peft 0.21.2 finds it."""
    patterns = fields.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: {key} is no JSON object")
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", name, timeout=MATCH_SECONDS):
                return value
        except (regex.error, TimeoutError) as error:
            raise UserError(f"{path}: {key} has {pattern!r}: {error}") from None
    return patterns.get(name, usual)
