"""The native folder: our parameters under their own names, described and sealed by model.json."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from sana_jax import text
from sana_jax.checkpoints.components import (
    Checkpoint,
    component_dtype,
    layout,
    module_for,
)
from sana_jax.checkpoints.mapping import Entry, check, read_params
from sana_jax.checkpoints.tensors import TensorReader, write_tensors
from sana_jax.errors import UserError
from sana_jax.models.dc_ae import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.models.layers import Dtype

FORMAT, VERSION = "sana_jax", 1
CONFIGS = {"dit": SanaConfig, "vae": DCAEConfig, "text_encoder": Gemma2Config}


def save(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int = 5 * 2**30) -> None:
    """Writes `checkpoint` to a new or empty `folder`; weights keep the dtype they have."""
    folder = Path(folder)
    for name in CONFIGS:
        flat = traverse_util.flatten_dict(checkpoint.params[name], sep="/")
        tensors = ((path, np.asarray(array)) for path, array in flat.items())
        write_tensors(tensors, folder, name, max_shard_bytes)
    checkpoint.tokenizer.save_pretrained(folder / "tokenizer")
    instruction = checkpoint.instruction
    model = {
        "format": FORMAT,
        "version": VERSION,
        **{name: dataclasses.asdict(checkpoint.config(name)) for name in CONFIGS},
        "latent_channels": checkpoint.vae.latent_channels,
        "factor": checkpoint.vae.factor,
        "scaling_factor": checkpoint.vae.scaling_factor,
        "sampler": {"flow_shift": checkpoint.flow_shift, "text_rows": checkpoint.text_rows},
        "instruction": instruction
        and {"text": instruction.text, "sha256": instruction.sha256, "source": instruction.source},
        "provenance": checkpoint.provenance,
        "files": {
            str(path.relative_to(folder)): _sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "model.json"
        },
    }
    # Last: it is what makes the folder a checkpoint.
    (folder / "model.json").write_text(json.dumps(model, indent=2) + "\n")


def load(folder: Path, dtype: Dtype, mesh: Mesh) -> Checkpoint:
    """Reads a folder with a model.json, every weight to its place on `mesh`. Raises UserError."""
    folder = Path(folder)
    model = read_json(folder / "model.json")
    if (model.get("format"), model.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{folder / 'model.json'} is format {model.get('format')!r} version"
            f" {model.get('version')!r}; this program reads {FORMAT!r} version {VERSION}"
        )
    try:
        configs = {n: cls(**_freeze(model[n])) for n, cls in CONFIGS.items()}
        sampler, files, instruction = model["sampler"], model["files"], model["instruction"]
        if instruction is not None:
            instruction = text.Instruction(instruction["text"], instruction["source"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'model.json'} is incomplete: {error!r}") from None
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing")
        if _sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is damaged: its sha256 is not the one in model.json")
    params = {n: _read_component(folder, n, c, dtype, mesh) for n, c in configs.items()}
    return Checkpoint(
        **configs,
        params=params,
        tokenizer=text.load_tokenizer(folder / "tokenizer"),
        text_rows=sampler["text_rows"],
        flow_shift=sampler["flow_shift"],
        instruction=instruction,
        provenance=model.get("provenance", {}),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    try:
        contents = json.loads(path.read_text())
    except OSError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds no JSON object")
    return contents


def _read_component(folder: Path, name: str, config, dtype: Dtype, mesh: Mesh):
    dtype = component_dtype(name, dtype)
    shapes, shardings = layout(module_for(config, dtype), mesh)
    table = [Entry(path, (path,)) for path in shapes]
    single = folder / f"{name}.safetensors"
    tensors = TensorReader(single if single.is_file() else Path(f"{single}.index.json"))
    check(name, table, shapes, tensors)
    return read_params(name, table, tensors, jnp.dtype(dtype), shardings)


def _freeze(value):
    """JSON's lists as the tuples of our configs."""
    if isinstance(value, dict):
        return {key: _freeze(item) for key, item in value.items()}
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
