"""Reads CLIP from a folder that transformers wrote, such as openai/clip-vit-large-patch14.

    config.json               the architecture; model_type "clip"
    model.safetensors         the weights, in one file or several with an index
    tokenizer.json, or vocab.json and merges.txt
    preprocessor_config.json  mean and spread of the pixels; OpenAI's where there is none

OpenCLIP's models are published in this format too, with GELU in place of quick GELU, and with files
and names of their own (openclip.py), which are read where a folder has both.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from sana_jax.checkpoints import openclip
from sana_jax.checkpoints.mapping import Entry, check, flat_leaves, lazy_params, linear
from sana_jax.checkpoints.tensors import TensorReader
from sana_jax.models.clip import CLIP, CLIPConfig, Tower
from sana_jax.models.layers import Dtype
from sana_jax.runtime.errors import UserError, refused
from sana_jax.runtime.files import read_json, sha256_of
from sana_jax.sharding import shardings_for
from sana_jax.text.tokenizers import import_transformers

MEAN = 0.48145466, 0.4578275, 0.40821073  # of OpenAI's pixels in 0 .. 1
STD = 0.26862954, 0.26130258, 0.27577711
UNREAD = "position_ids", "logit_scale", "logit_bias"
ACTIVATIONS = {"quick_gelu": True, "gelu": False}
# transformers leaves out of config.json what has its default.
DEFAULTS = {
    "hidden_size": (512, 768),  # of texts, of pictures
    "num_hidden_layers": (12, 12),
    "num_attention_heads": (8, 12),
    "intermediate_size": (2048, 3072),
    "layer_norm_eps": (1e-5, 1e-5),
    "hidden_act": ("quick_gelu", "quick_gelu"),
}


@dataclasses.dataclass
class CLIPCheckpoint:
    """The contents of a folder. The leaves of `params` are read when they are used."""

    folder: Path
    config: CLIPConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    params: Any

    def module(self, dtype: Dtype = "float32") -> CLIP:
        return CLIP(self.config, dtype=dtype, param_dtype=dtype)

    def place(self, mesh: Mesh, dtype: Dtype = "float32", tower: str | None = None) -> Any:
        """Returns the parameters on the devices of a mesh, cast to `dtype`.

        `tower` names the only one that is needed, vision or text. Raises UserError.
        """
        names = ("vision", "text") if tower is None else (tower,)
        boxed = _abstract(self.config)
        shardings = shardings_for({name: boxed[name] for name in names}, mesh)
        params = {name: self.params[name] for name in names}
        with refused(f"{self.folder}"):
            return jax.tree.map(
                lambda leaf, where: jax.device_put(np.asarray(leaf, np.dtype(dtype)), where),
                params,
                shardings,
            )

    def tokenizer(self):
        """Returns the tokenizer, of transformers. Raises UserError."""
        names = "tokenizer.json", "vocab.json"
        if not any((self.folder / name).is_file() for name in names):
            raise UserError(f"{self.folder} has no tokenizer.json and no vocab.json")
        kind = import_transformers().CLIPTokenizerFast
        with refused(f"{self.folder} holds no tokenizer that transformers reads"):
            found = kind.from_pretrained(self.folder, local_files_only=True)
        if len(found) > self.config.vocab_size:
            raise UserError(
                f"{self.folder}: the tokenizer has {len(found)} tokens, the network"
                f" {self.config.vocab_size}: they do not belong together"
            )
        return found

    def sha256(self) -> str:
        """Returns a hash of the files that decide the features."""
        names = "config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
        files = [self.folder / name for name in (*names, openclip.CONFIG, openclip.WEIGHTS)]
        files += sorted(self.folder.glob("model*.safetensors"))
        digest = hashlib.sha256()
        for file in files:
            if file.is_file():
                digest.update(f"{file.name} {sha256_of(file)}\n".encode())
        return digest.hexdigest()

    def tokenize(self, texts: list[str], tokenizer) -> np.ndarray:
        """Returns tokens, int32 (B, context): cut so that the end stays, as OpenAI's truncate."""
        options = dict(padding="max_length", truncation=True, max_length=self.config.context)
        return np.asarray(tokenizer(texts, **options)["input_ids"], np.int32)


def open_clip(folder: str | Path) -> CLIPCheckpoint:
    """Opens and checks a folder; the weights stay unread. Raises UserError."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: give one with CLIP as transformers writes it, such as a"
            " download of openai/clip-vit-large-patch14"
        )
    if all((folder / name).is_file() for name in (openclip.CONFIG, openclip.WEIGHTS)):
        path, file = folder / openclip.CONFIG, folder / openclip.WEIGHTS
        config, found = openclip.read_config(path)
        names, table = ("mean", "std"), list(openclip.entries(config))
    else:
        config = read_config(folder / "config.json")
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        file, path = index if index.is_file() else single, folder / "preprocessor_config.json"
        found = read_json(path) if path.is_file() else {}
        names, table = ("image_mean", "image_std"), list(entries(config))
    theirs, shapes = TensorReader(file), flat_leaves(nn.unbox(_abstract(config)))
    check(f"{folder}: CLIP", table, shapes, theirs, UNREAD)
    mean, std = _pixels(path, found, names)
    return CLIPCheckpoint(folder, config, mean, std, lazy_params(table, shapes, theirs))


def read_config(path: Path) -> CLIPConfig:
    """Returns the architecture that a config.json describes. Raises UserError."""
    config = read_json(path)
    if config.get("model_type") != "clip":
        raise UserError(
            f"{path} has model_type {config.get('model_type')!r}, where 'clip' is needed"
        )
    # The older files hold what was changed in a second group, which counts.
    text, vision = (
        {**_group(config, f"{name}_config"), **_group(config, f"{name}_config_dict")}
        for name in ("text", "vision")
    )
    towers, kinds = [], set()
    for i, group in enumerate((text, vision)):
        found = {name: group.get(name, default[i]) for name, default in DEFAULTS.items()}
        kinds.add(str(found.pop("hidden_act")))
        if found.pop("layer_norm_eps") != 1e-5:
            raise UserError(f"{path}: layer_norm_eps is not 1e-5, which is not supported")
        towers.append(list(found.values()))
    (kind,) = kinds if len(kinds) == 1 else (None,)
    if kind not in ACTIVATIONS:
        known, given = " or ".join(ACTIVATIONS), " and ".join(sorted(kinds))
        raise UserError(
            f"{path}: hidden_act is {given}, where {known} is supported, for both towers"
        )
    end = text.get("eos_token_id", 49407)
    try:
        return CLIPConfig(
            embedding=config.get("projection_dim", 512),
            vision=Tower(*towers[1]),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 32),
            text=Tower(*towers[0]),
            context=text.get("max_position_embeddings", 77),
            vocab_size=text.get("vocab_size", 49408),
            end_token=None if end == 2 else end,  # 2 stands in the older files, and is wrong
            quick_gelu=ACTIVATIONS[kind],
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _group(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return {k: v for k, v in found.items() if v is not None} if isinstance(found, dict) else {}


def _pixels(
    path: Path, found: dict[str, Any], names: tuple[str, str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and the spread that a file gives by these names."""
    mean, std = (found.get(n, list(x)) for n, x in zip(names, (MEAN, STD), strict=True))
    for name, values in zip(names, (mean, std), strict=True):
        numbers = isinstance(values, list) and all(type(x) in (int, float) for x in values)
        if not numbers or len(values) != 3 or (values is std and min(values) <= 0):
            raise UserError(f"{path}: {name} {values!r:.60} is not three numbers")
    return tuple(mean), tuple(std)


def _abstract(config: CLIPConfig):
    picture = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), np.float32)
    tokens = jax.ShapeDtypeStruct((1, config.context), np.int32)
    return jax.eval_shape(CLIP(config).init, jax.random.key(0), picture, tokens)["params"]


def entries(config: CLIPConfig) -> Iterator[Entry]:
    """Yields the entries of a CLIPModel of transformers."""
    theirs = {"vision": "vision_model", "text": "text_model"}
    sizes = (("p", config.patch_size), ("q", config.patch_size))
    patch = "vision_model.embeddings.patch_embedding.weight"
    yield Entry("vision/patch_embed/kernel", (patch,), "o c p q -> (p q c) o", sizes=sizes)
    token = "vision_model.embeddings.class_embedding"
    yield Entry("vision/class_token", (token,), "c -> 1 c")
    yield from _norm("vision/first_norm", "vision_model.pre_layrnorm")
    yield from _norm("vision/last_norm", "vision_model.post_layernorm")
    yield Entry("text/embed/embedding", ("text_model.embeddings.token_embedding.weight",))
    yield from _norm("text/last_norm", "text_model.final_layer_norm")
    for ours, name in theirs.items():
        yield Entry(f"{ours}/positions", (f"{name}.embeddings.position_embedding.weight",))
        projection = {"vision": "visual_projection", "text": "text_projection"}[ours]
        yield from linear(f"{ours}/project", projection, bias=False)
        tower = config.vision if ours == "vision" else config.text
        layers = {"layers": range(tower.depth)}
        layer, mine = f"{name}.encoder.layers.{{i}}", f"{ours}/transformer/layers"
        for i in (1, 2):
            yield from _norm(f"{mine}/norm{i}", f"{layer}.layer_norm{i}", **layers)
        heads = [f"{layer}.self_attn.{t}_proj" for t in "qkv"]
        yield from linear(f"{mine}/qkv", *heads, **layers)
        yield from linear(f"{mine}/out", f"{layer}.self_attn.out_proj", **layers)
        yield from linear(f"{mine}/expand", f"{layer}.mlp.fc1", **layers)
        yield from linear(f"{mine}/contract", f"{layer}.mlp.fc2", **layers)


def _norm(ours: str, theirs: str, **layers) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", (f"{theirs}.weight",), **layers)
    yield Entry(f"{ours}/bias", (f"{theirs}.bias",), **layers)
