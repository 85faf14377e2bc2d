"""CLIP in a folder of open_clip's: OpenAI's names of tensors, and a config of its own.

    open_clip_config.json       the architecture, and mean and spread of the pixels
    open_clip_model.safetensors the weights

Where transformers' files lie beside them, checkpoints/clip.py reads those. Towers of other kinds
(CoCa, SigLIP, text encoders of Hugging Face) are refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_jax.checkpoints.mapping import LINEAR, Entry, linear
from sana_jax.models.clip import CLIPConfig, Tower
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import read_json

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
# Keys of a model that say nothing of the network where they have these values.
UNCHANGED: dict[str, Any] = {
    "custom_text": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
}


def read_config(path: Path) -> tuple[CLIPConfig, dict[str, Any]]:
    """Returns the architecture, and the settings of the pixels. Raises UserError."""
    contents = read_json(path)
    try:
        model = dict(contents["model_cfg"])
        embedding, quick = model.pop("embed_dim"), model.pop("quick_gelu", False)
        vision, text = dict(model.pop("vision_cfg")), dict(model.pop("text_cfg"))
        others = [key for key, value in model.items() if UNCHANGED.get(key, value) != value]
        others += [key for key in model if key not in UNCHANGED]
        others += sorted({*vision} - VISION) + sorted({*text} - TEXT)
        if others:
            raise ValueError(f"{others[0]} is not supported")
        width, layers = vision["width"], vision["layers"]
        heads, hidden = width // vision.get("head_width", 64), vision.get("mlp_ratio", 4) * width
        return CLIPConfig(
            embedding=embedding,
            vision=Tower(width, layers, heads, int(hidden)),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            text=Tower(text["width"], text["layers"], text["heads"], 4 * text["width"]),
            context=text["context_length"],
            vocab_size=text["vocab_size"],
            end_token=None,
            quick_gelu=bool(quick),
        ), _pixels(contents)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is no CLIP of open_clip that is read: {reason}") from None


def _pixels(contents: dict[str, Any]) -> dict[str, Any]:
    found = contents.get("preprocess_cfg", {})
    return {f"image_{name}": found[name] for name in ("mean", "std") if name in found}


def entries(config: CLIPConfig) -> Iterator[Entry]:
    """Yields the entries of open_clip's CLIP, whose matrices q, k and v are one."""
    sizes = (("p", config.patch_size), ("q", config.patch_size))
    patch = "visual.conv1.weight"
    yield Entry("vision/patch_embed/kernel", (patch,), "o c p q -> (p q c) o", sizes=sizes)
    yield Entry("vision/class_token", ("visual.class_embedding",), "c -> 1 c")
    yield Entry("vision/positions", ("visual.positional_embedding",))
    yield Entry("vision/project/kernel", ("visual.proj",))
    yield from _norm("vision/first_norm", "visual.ln_pre")
    yield from _norm("vision/last_norm", "visual.ln_post")
    yield Entry("text/embed/embedding", ("token_embedding.weight",))
    yield Entry("text/positions", ("positional_embedding",))
    yield Entry("text/project/kernel", ("text_projection",))
    yield from _norm("text/last_norm", "ln_final")
    for ours, prefix, tower in (("vision", "visual.", config.vision), ("text", "", config.text)):
        layers: dict[str, Any] = {"layers": range(tower.depth)}
        layer, mine = f"{prefix}transformer.resblocks.{{i}}", f"{ours}/transformer/layers"
        for i in (1, 2):
            yield from _norm(f"{mine}/norm{i}", f"{layer}.ln_{i}", **layers)
        yield Entry(f"{mine}/qkv/kernel", (f"{layer}.attn.in_proj_weight",), LINEAR, **layers)
        yield Entry(f"{mine}/qkv/bias", (f"{layer}.attn.in_proj_bias",), **layers)
        yield from linear(f"{mine}/out", f"{layer}.attn.out_proj", **layers)
        yield from linear(f"{mine}/expand", f"{layer}.mlp.c_fc", **layers)
        yield from linear(f"{mine}/contract", f"{layer}.mlp.c_proj", **layers)


def _norm(ours: str, theirs: str, **layers) -> Iterator[Entry]:
    yield Entry(f"{ours}/scale", (f"{theirs}.weight",), **layers)
    yield Entry(f"{ours}/bias", (f"{theirs}.bias",), **layers)
