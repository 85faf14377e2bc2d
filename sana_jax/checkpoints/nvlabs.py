"""The transformer in the .pth files of NVIDIA's own repository (github.com/NVlabs/Sana).

A release is a state dict, bare or under "state_dict"; a training checkpoint also has the averaged
weights under "state_dict_ema", and much that is not read. Neither says how the network is built:
the architecture follows from the shapes, except for the arguments of `open_checkpoint`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from absl import logging
from jax.sharding import Mesh

from sana_jax.checkpoints.components import param_shapes, place
from sana_jax.checkpoints.mapping import DEPTHWISE, POINTWISE, Entry, check, lazy_params, linear
from sana_jax.checkpoints.pth import PthReader
from sana_jax.checkpoints.tensors import Tensors, Unprefixed
from sana_jax.models.dit import SPRINT, SanaConfig
from sana_jax.models.layers import Dtype
from sana_jax.runtime.errors import UserError

# Tensors in the files that are no part of the network: positions, which are computed; the text
# embedding of an empty prompt; a head that only a distillation loss needs.
IGNORED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
PATCH = "x_embedder.proj.weight"  # every file of theirs has it
# part of a tensor's name, or of the file's -> the relative of SANA that it belongs to
UNSUPPORTED = {
    "controlnet.": "Sana ControlNet",
    ".t_conv.": "Sana Video",
    ".flash_attn_additional.": "Sana Video",
    "controlnet_blocks.": "Sana ControlNet",
}
# Sprint's input of guidance, in their names and in diffusers'; the name of a file of its teacher,
# which has the usual tensors, but times of 0 .. 1.
GUIDANCE, TEACHER = ("cfg_embedder.", ".guidance_embedder."), "Sana_Sprint"
CROSS_HEADS = {1152: 16, 2240: 20}  # published width -> heads of the cross-attention
PIXELS = 32  # image pixels along one side of a latent pixel
IMAGE_SIZES = {"512": 512, "1024": 1024, "2048": 2048, "2K": 2048, "4096": 4096, "4K": 4096}
# side of the native latent -> scale of its positions; smaller latents have no positions
INTERPOLATION_SCALES = {64: 1.0, 128: 2.0}


def dit_entries(config: SanaConfig) -> Iterator[Entry]:
    """Yields the table that maps their tensors to our parameters."""
    sizes = (("p", config.patch_size), ("q", config.patch_size))
    yield Entry("patch_embed/kernel", (PATCH,), "o c p q -> (c p q) o", sizes=sizes)
    yield Entry("patch_embed/bias", ("x_embedder.proj.bias",))
    yield from linear("time_embed/linear_1", "t_embedder.mlp.0")
    yield from linear("time_embed/linear_2", "t_embedder.mlp.2")
    if config.is_sprint:
        yield from linear("time_embed/guidance_linear_1", "cfg_embedder.mlp.0")
        yield from linear("time_embed/guidance_linear_2", "cfg_embedder.mlp.2")
    yield from linear("time_embed/modulation", "t_block.1")
    yield from linear("caption_embed/linear_1", "y_embedder.y_proj.fc1")
    yield from linear("caption_embed/linear_2", "y_embedder.y_proj.fc2")
    yield Entry("caption_embed/norm/scale", ("attention_y_norm.weight",))
    yield Entry("final_table", ("final_layer.scale_shift_table",))
    yield from linear("proj_out", "final_layer.linear")

    layers = {"layers": range(config.depth)}
    attention, cross, mlp = (f"blocks.{{i}}.{part}" for part in ("attn", "cross_attn", "mlp"))
    yield Entry("blocks/modulation_table", ("blocks.{i}.scale_shift_table",), **layers)
    bias = config.attention_bias
    yield from linear("blocks/attention/qkv", f"{attention}.qkv", bias=bias, **layers)
    yield from linear("blocks/attention/out", f"{attention}.proj", **layers)
    yield from linear("blocks/cross_attention/q", f"{cross}.q_linear", **layers)
    yield from linear("blocks/cross_attention/kv", f"{cross}.kv_linear", **layers)
    yield from linear("blocks/cross_attention/out", f"{cross}.proj", **layers)
    if config.qk_norm:
        for ours, theirs in ("attention", attention), ("cross_attention", cross):
            for t in "qk":
                yield Entry(
                    f"blocks/{ours}/{t}_norm/scale", (f"{theirs}.{t}_norm.weight",), **layers
                )
    expand, depthwise = f"{mlp}.inverted_conv.conv", f"{mlp}.depth_conv.conv"
    yield Entry("blocks/ffn/expand/kernel", (f"{expand}.weight",), POINTWISE, **layers)
    yield Entry("blocks/ffn/expand_bias", (f"{expand}.bias",), **layers)
    yield Entry("blocks/ffn/depthwise_kernel", (f"{depthwise}.weight",), DEPTHWISE, **layers)
    yield Entry("blocks/ffn/depthwise_bias", (f"{depthwise}.bias",), **layers)
    point = f"{mlp}.point_conv.conv.weight"
    yield Entry("blocks/ffn/contract/kernel", (point,), POINTWISE, **layers)


def open_checkpoint(
    path: Path,
    use_ema: bool = False,
    image_size: int | None = None,
    cross_heads: int | None = None,
) -> tuple[SanaConfig, Unprefixed]:
    """Returns the architecture of a .pth file and its tensors. Raises UserError.

    use_ema: read the averaged weights. The other arguments are those of `infer`.
    """
    path = Path(path)
    reader = PthReader(path)
    if use_ema and "state_dict_ema" not in reader.sections:
        raise UserError(f"{path} has no state_dict_ema: read it without the averaged weights")
    section = "state_dict_ema" if use_ema else "state_dict"
    if section in reader.sections:
        reader = PthReader(path, reader.sections[section])
    tensors = Unprefixed(reader)
    return infer(path, tensors, dit_entries, image_size, cross_heads), tensors


def flow_shift(config: SanaConfig) -> float:
    """Returns the flow shift, which the file does not hold: 6 for the 4096 px model, else 3."""
    return 6.0 if config.sample_size == 128 else 3.0


def open_dit(path: Path, **kwargs):
    """Returns the config and the unread parameters of a .pth file, checked. Raises UserError.

    The keywords are those of `open_checkpoint`.
    """
    config, reader = open_checkpoint(path, **kwargs)
    shapes, table = param_shapes(config), list(dit_entries(config))
    check(f"transformer ({Path(path).name})", table, shapes, reader, IGNORED)
    return config, lazy_params(table, shapes, reader)


def load_dit(path: Path, dtype: Dtype, mesh: Mesh, **kwargs):
    """Opens a .pth file and places every weight on `mesh`, cast to `dtype`. Raises UserError.

    Returns the config and the parameters. The keywords are those of `open_checkpoint`.
    """
    config, params = open_dit(path, **kwargs)
    try:
        return config, place(params, config, dtype, mesh)
    except UserError as error:  # it names a tensor, but not its file
        raise UserError(f"{Path(path).name}: {error}") from None


def infer(
    path: Path,
    reader: Tensors,
    entries: Callable[[SanaConfig], Iterable[Entry]],
    image_size: int | None = None,
    cross_heads: int | None = None,
) -> SanaConfig:
    """Returns the architecture of a transformer from its tensors' shapes. Raises UserError.

    entries: the table with their names. image_size: the native side in pixels, which decides about
    positions; None takes it from the length of the stored positions, else from the file's name,
    else 1024. cross_heads: heads of the cross-attention; None is enough for the published widths.
    """
    for mark, kind in UNSUPPORTED.items():
        if any(mark in name for name in (path.stem, *reader)):
            raise UserError(f"{path} is a {kind} checkpoint, which is not supported")
    names = {entry.path: entry.names[0] for entry in entries(SanaConfig(qk_norm=True))}

    def shape(ours: str, axes: int) -> tuple[int, ...]:
        name = names[ours].replace("{i}", "0")
        found = reader.shape(name) if name in reader else None
        if found is None or len(found) != axes or not all(0 < n < 2**20 for n in found):
            what = "no" if found is None else f"{list(found)} as"
            raise UserError(f"{path} is no Sana transformer: it has {what} {name}")
        return found

    patch_name = names["patch_embed/kernel"]
    if patch_name in reader and len(reader.shape(patch_name)) == 5:
        raise UserError(f"{path} is a Sana Video checkpoint, which is not supported")
    width, channels, patch, _ = shape("patch_embed/kernel", 4)
    _, hidden, _, _ = shape("blocks/ffn/contract/kernel", 4)
    _, caption_channels = shape("caption_embed/linear_1/kernel", 2)
    head_dim = SanaConfig.head_dim
    heads = cross_heads or CROSS_HEADS.get(width)
    if not heads or heads < 1 or width % heads or width % head_dim:
        known = " and ".join(map(str, CROSS_HEADS))
        raise UserError(
            f"{path} has width {width}, in heads of {head_dim}: shapes do not tell the number of"
            f" cross-attention heads, known for {known} only; give --cross_heads"
        )
    sample_size = _sample_size(path, reader, image_size, patch)
    # The network rounds width * ratio down: the ratio must give `hidden` again.
    ratio = hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width
    is_sprint = any(mark in name for mark in GUIDANCE for name in reader)
    scale = SPRINT["timestep_scale"] if is_sprint or TEACHER in path.stem else 1.0
    block = re.escape(names["blocks/modulation_table"].partition("{i}")[0]) + r"(\d+)\."
    return SanaConfig(
        latent_channels=channels,
        depth=len({found[1] for name in reader if (found := re.match(block, name))}),
        width=width,
        cross_heads=heads,
        caption_channels=caption_channels,
        mlp_ratio=ratio,
        patch_size=patch,
        sample_size=sample_size,
        interpolation_scale=INTERPOLATION_SCALES.get(sample_size),
        qk_norm=names["blocks/attention/q_norm/scale"].replace("{i}", "0") in reader,
        timestep_scale=scale,
        guidance_embedding=SPRINT["guidance_embedding"] if is_sprint else None,
    )


def _sample_size(path: Path, reader: Tensors, image_size: int | None, patch: int) -> int:
    """Returns the side of the native latent, in latent pixels."""
    stored = [name for name in ("pos_embed", "patch_embed.pos_embed") if name in reader]
    positions = reader.shape(stored[0]) if stored else ()
    if image_size is None and len(positions) == 3:
        side = math.isqrt(positions[1])
        if side and side**2 == positions[1]:
            return side * patch
    if image_size is None:
        named = re.search(r"(?<!\d)(512|1024|2048|4096|2K|4K)px", path.name)
        image_size = IMAGE_SIZES[named[1]] if named else 1024
        if not named:
            logging.warning("%s does not say its native size: taken as 1024 pixels", path)
    if image_size < PIXELS or image_size % (PIXELS * patch):
        raise UserError(f"image_size {image_size} is no multiple of {PIXELS * patch}")
    return image_size // PIXELS
