"""The config and the names of CLIP as OpenCLIP publishes it, such as ViT-B/32 and ViT-L/14.

    open_clip_config.json       the architecture, and mean and spread of the pixels
    open_clip_model.safetensors the weights

Activations are GELU unless the config says quick_gelu, as for OpenAI's weights. Towers from timm
or from Hugging Face, other kinds of pooling and SigLIP are not supported.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_jax.checkpoints.mapping import LINEAR, Entry, linear
from sana_jax.models.clip import CLIPConfig, Tower
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import read_json

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# What a group may say; a key that is not here is one of another architecture.
TOWER = {"layers", "width", "mlp_ratio"}
KNOWN = {
    "vision_cfg": TOWER | {"image_size", "patch_size", "head_width"},
    "text_cfg": TOWER | {"context_length", "vocab_size", "heads"},
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_scale"},
    "preprocess_cfg": {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"},
}
# What a group has of its own accord, which some files say nevertheless (open_clip's model.py).
USUAL = {
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear"},
}
FIXED = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}


def read_config(path: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Returns the architecture that a file describes, and what it says of the pixels.

    Raises UserError.
    """
    file = read_json(path)
    model, pixels = (_group(path, file, name) for name in ("model_cfg", "preprocess_cfg"))
    vision, text = (_group(path, model, name) for name in ("vision_cfg", "text_cfg"))
    for name, value in FIXED.items():
        if pixels.get(name, value) != value:
            raise UserError(f"{path}: {name} {pixels[name]!r:.40}, where {value} is supported")
    try:
        width = vision.get("width", 768)
        heads = width // vision.get("head_width", 64)
        return CLIPConfig(
            embedding=model["embed_dim"],
            vision=_tower(vision, width, heads),
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 16),
            text=_tower(text, text.get("width", 512), text.get("heads", 8)),
            context=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            quick_gelu=bool(model.get("quick_gelu", False)),
        ), pixels
    except KeyError as error:
        raise UserError(f"{path}: it has no {error}") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None


def _tower(group: dict[str, Any], width: int, heads: int) -> Tower:
    return Tower(width, group.get("layers", 12), heads, int(width * group.get("mlp_ratio", 4.0)))


def _group(path: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} is no object")
    usual, unknown = USUAL.get(name, {}), found.keys() - KNOWN[name]
    if others := sorted(key for key in unknown if found[key] and found[key] != usual.get(key)):
        raise UserError(f"{path}: {name} has {', '.join(others)}, of a model that is not supported")
    return {key: value for key, value in found.items() if value is not None}


def entries(config: CLIPConfig) -> Iterator[Entry]:
    """Yields the entries of OpenCLIP's CLIP, whose names are those of OpenAI's own code."""
    sizes = (("p", config.patch_size), ("q", config.patch_size))
    patch = "visual.conv1.weight"
    yield Entry("vision/patch_embed/kernel", (patch,), "o c p q -> (p q c) o", sizes=sizes)
    yield Entry("vision/class_token", ("visual.class_embedding",), "c -> 1 c")
    yield from _norm("vision/first_norm", "visual.ln_pre")
    yield from _norm("vision/last_norm", "visual.ln_post")
    yield Entry("vision/project/kernel", ("visual.proj",))
    yield Entry("text/embed/embedding", ("token_embedding.weight",))
    yield from _norm("text/last_norm", "ln_final")
    yield Entry("text/project/kernel", ("text_projection",))
    for ours, theirs, depth in (
        ("vision", "visual.", config.vision.depth),
        ("text", "", config.text.depth),
    ):
        yield Entry(f"{ours}/positions", (f"{theirs}positional_embedding",))
        layers = {"layers": range(depth)}
        layer, mine = f"{theirs}transformer.resblocks.{{i}}", f"{ours}/transformer/layers"
        for i in (1, 2):
            yield from _norm(f"{mine}/norm{i}", f"{layer}.ln_{i}", **layers)
        attention = f"{layer}.attn"
        yield Entry(f"{mine}/qkv/kernel", (f"{attention}.in_proj_weight",), LINEAR, **layers)
        yield Entry(f"{mine}/qkv/bias", (f"{attention}.in_proj_bias",), **layers)
        yield from linear(f"{mine}/out", f"{attention}.out_proj", **layers)
        yield from linear(f"{mine}/expand", f"{layer}.mlp.c_fc", **layers)
        yield from linear(f"{mine}/contract", f"{layer}.mlp.c_proj", **layers)


def _norm(ours: str, theirs: str, **layers) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", (f"{theirs}.weight",), **layers)
    yield Entry(f"{ours}/bias", (f"{theirs}.bias",), **layers)
