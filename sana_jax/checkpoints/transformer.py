"""A transformer that is published alone: a .pth or .safetensors file, or a fine-tune's folder.

A file names its tensors as NVlabs or as diffusers do, all of them after the same prefix or none.
"""

from pathlib import Path
from typing import Any, NamedTuple

from sana_jax.checkpoints import diffusers, diffusers_names, nvlabs
from sana_jax.checkpoints.components import param_shapes
from sana_jax.checkpoints.find import find
from sana_jax.checkpoints.mapping import check, lazy_params
from sana_jax.checkpoints.tensors import TensorReader, Unprefixed
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError

FILES = ".pth", ".safetensors"
PATCH = "patch_embed.proj.weight"  # every file with diffusers' names has it


class Transformer(NamedTuple):
    config: SanaConfig
    params: Any  # unread
    provenance: dict[str, Any]  # "layout" says whose names it has: "nvlabs" or "diffusers"


def open_transformer(
    source: str, variant: str | None = None, revision: str | None = None, **kwargs
) -> Transformer:
    """Opens a transformer that stands alone, in a file, a folder or on the hub. Raises UserError.

    A folder holds diffusers' config.json and weights, itself or in transformer/; `variant` and
    `revision` are for it. The keywords are those of `nvlabs.open_checkpoint`, for a file.
    """
    path = Path(source).expanduser()
    if path.suffix in FILES:
        open_file = nvlabs.open_dit if path.suffix == ".pth" else _open_safetensors
        config, params, *layout = open_file(path, **kwargs)
        return Transformer(config, params, {"source": path.name, "layout": (*layout, "nvlabs")[0]})
    if wrong := [name for name, value in kwargs.items() if value]:
        raise UserError(f"--{wrong[0].removeprefix('use_')} is for a file; {source} is none")
    if not any((path / name / "config.json").is_file() for name in ("", "transformer")):
        path = find(source, revision, variant)
    elif revision:
        raise UserError(f"{source} is a folder, which has no revision {revision!r}")
    if any((path / marker).is_file() for marker in ("model.json", "model_index.json")):
        raise UserError(f"{source} is a whole checkpoint: leave --rest out")
    config, params = diffusers.open_component(path, "dit", variant)
    made = path.absolute().parent if path.name == "transformer" else path.absolute()
    return Transformer(config, params, diffusers.provenance(made, variant))


def _open_safetensors(
    path: Path,
    use_ema: bool = False,
    image_size: int | None = None,
    cross_heads: int | None = None,
) -> tuple[SanaConfig, Any, str]:
    if use_ema:
        raise UserError(
            f"--ema is for a .pth file, which may hold averaged weights; {path} is none"
        )
    tensors = Unprefixed(TensorReader(path))
    layout, entries, ignored = "nvlabs", nvlabs.dit_entries, nvlabs.IGNORED
    if nvlabs.PATCH not in tensors:
        layout, entries, ignored = "diffusers", diffusers_names.dit_entries, diffusers.IGNORED
        if PATCH not in tensors:
            raise UserError(
                f"{path} is no Sana transformer alone: it has neither {nvlabs.PATCH} (NVlabs) nor"
                f" {PATCH} (diffusers), but {next(iter(tensors), 'nothing')}"
            )
    if layout == "diffusers" and (path.parent / "config.json").is_file():
        config = diffusers.read_config(path.parent / "config.json", "dit")
    else:
        config = nvlabs.infer(path, tensors, entries, image_size, cross_heads)
    shapes, table = param_shapes(config), list(entries(config))
    check(f"transformer ({path.name})", table, shapes, tensors, ignored)
    return config, lazy_params(table, shapes, tensors), layout
