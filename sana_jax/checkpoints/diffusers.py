"""Reads and writes folders in the layout of diffusers' SanaPipeline and SanaSprintPipeline.

Reading needs neither diffusers nor torch. Tensor names are in diffusers_names.py.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from sana_jax.checkpoints.components import Checkpoint, Config, param_shapes
from sana_jax.checkpoints.diffusers_configs import (
    config_json,
    dc_ae_from_diffusers,
    gemma2_from_transformers,
    sana_from_diffusers,
)
from sana_jax.checkpoints.diffusers_fields import SCHEDULERS, SCM, check_supported
from sana_jax.checkpoints.diffusers_names import entries
from sana_jax.checkpoints.mapping import check, lazy_params, write_params
from sana_jax.checkpoints.tensors import LazyArray, TensorReader, read_index, write_tensors
from sana_jax.diffusion.flow import SHIFTS
from sana_jax.diffusion.trigflow import SIGMA_DATA
from sana_jax.runtime.checks import number
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import local, read_json
from sana_jax.text.tokenizers import load_tokenizer, save_tokenizer

# our name -> their folder, the stem of its weight files, the reader of its config.json
COMPONENTS = {
    "dit": ("transformer", "diffusion_pytorch_model", sana_from_diffusers),
    "vae": ("vae", "diffusion_pytorch_model", dc_ae_from_diffusers),
    "text_encoder": ("text_encoder", "model", gemma2_from_transformers),
}
# Tensors in some files that are never needed: counters, and buffers that follow from the config.
COUNTER = "num_batches_tracked"
IGNORED = (COUNTER, "rotary_emb.inv_freq", "pos_embed", "lm_head.weight")
UNSUPPORTED = {"ControlNet": "Sana ControlNet", "PAG": "Sana PAG", "Video": "Sana Video"}
SPRINT = "SanaSprintPipeline", "SanaSprintImg2ImgPipeline"  # the same networks
TEXT_ROWS = 300  # the default of max_sequence_length in diffusers' pipeline; no folder stores it


def open_folder(folder: Path, variant: str | None = None) -> Checkpoint:
    """Opens the checkpoint in a folder with a model_index.json; its weights stay unread.

    A folder without a model_index.json holds an autoencoder alone, as DC-AE is published. `variant`
    picks files such as diffusion_pytorch_model.bf16.safetensors. These folders hold no complex
    human instruction. Raises UserError.
    """
    folder = Path(folder)
    names = component_names(folder)
    if "vae" not in names:
        raise UserError(
            f"{folder} holds the transformer alone; this adds the other networks: python -m"
            f" sana_jax.convert --source={folder} --rest=DIR --out=NATIVE_DIR"
        )
    if variant and not any(_find_weights(folder, name, variant)[1] for name in names):
        raise UserError(f"{folder} has no files of variant {variant!r}")
    networks = {name: open_component(folder, name, variant) for name in names}
    checkpoint = Checkpoint(
        **{name: config for name, (config, _) in networks.items()},
        params={name: params for name, (_, params) in networks.items()},
        provenance=provenance(folder, variant),
    )
    if "text_encoder" not in names:
        return checkpoint
    checkpoint = dataclasses.replace(
        checkpoint, tokenizer=load_tokenizer(folder / "tokenizer"), text_rows=TEXT_ROWS
    )
    kind, shift = _read_scheduler(folder / "scheduler")
    if (kind == SCM) != checkpoint.dit.is_sprint:
        embeds = "embeds" if checkpoint.dit.is_sprint else "does not embed"
        raise UserError(
            f"{folder} has {kind} for a transformer that {embeds} the guidance scale: Sprint has"
            f" {SCM} and one that does, other models neither"
        )
    return checkpoint if kind == SCM else dataclasses.replace(checkpoint, flow_shift=shift)


def open_component(folder: Path, name: str, variant: str | None = None) -> tuple[Config, Any]:
    """Returns the config and the unread parameters of one network.

    `name` is "dit", "vae" or "text_encoder". Raises UserError.
    """
    config = read_config(_subfolder(folder, name) / "config.json", name)
    path, is_variant = _find_weights(folder, name, variant)
    if variant and not is_variant:
        logging.warning("%s has no variant %s: reading %s", path.parent, variant, path.name)
    shapes, table = param_shapes(config), entries(config)
    tensors = TensorReader(path, prefix="model." if name == "text_encoder" else "")
    check(f"{path.parent.name} ({path.name})", table, shapes, tensors, IGNORED)
    return config, lazy_params(table, shapes, tensors)


def files(folder: Path, variant: str | None = None) -> list[Path]:
    """Returns all files that `open_folder` reads, sorted by name."""
    found, names = [], component_names(folder)
    if "text_encoder" in names:
        found = [folder / "scheduler" / "scheduler_config.json"]
        found += [path for path in (folder / "tokenizer").iterdir() if path.is_file()]
    for name in names:
        weights, _ = _find_weights(folder, name, variant)
        found += [_subfolder(folder, name) / "config.json", weights]
        if weights.suffix == ".json":
            found += set(read_index(weights).values())
    return sorted(found)


def save(checkpoint: Checkpoint, folder: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that diffusers loads; weights keep their dtype. Raises UserError."""
    folder = local(folder)
    if missing := COMPONENTS.keys() - checkpoint.configs():
        raise UserError(
            f"a diffusers folder needs {', '.join(sorted(missing))}, which is not there"
        )
    if names := [name for name, config in checkpoint.configs().items() if config.quantised]:
        raise UserError(
            f"a diffusers folder cannot hold quantised weights, as of {', '.join(names)}: convert"
            " the checkpoint that they were made from"
        )
    if variants := checkpoint.dit.variants():
        given = ", ".join(f"{name}={value}" for name, value in variants.items())
        raise UserError(
            f"a diffusers folder cannot hold a transformer with {given}: keep it native"
        )
    if checkpoint.text_rows != TEXT_ROWS or checkpoint.dit.clip_attention is not None:
        logging.warning(
            "a diffusers folder cannot hold text_rows and clip_attention: they are lost"
        )
    if checkpoint.unconditional_mask == "prompt":
        logging.warning(
            "a diffusers folder cannot say that guidance's other half sees the prompt's mask, and"
            " diffusers draws with the negative prompt's"
        )
    if checkpoint.instruction is None:
        logging.warning(
            "a diffusers folder cannot say that a model takes no instruction: draw from it with"
            " instruction=None, or --no_instruction"
        )
    kind = SPRINT[0] if checkpoint.dit.is_sprint else "SanaPipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.42.1"}
    for name, config in checkpoint.configs().items():
        subfolder, stem, _ = COMPONENTS[name]
        tensors = [*write_params(entries(config), checkpoint.params[name])]
        # torch's batch norm counts its batches and complains if the file has no counter.
        counters = [n.replace("running_var", COUNTER) for n, _ in tensors if "running_var" in n]
        zero = LazyArray((), np.dtype("int64"), lambda dtype: np.zeros((), dtype))
        tensors += [(name, zero) for name in counters]
        write_tensors(tensors, folder / subfolder, stem, max_shard_bytes)
        is_text = name == "text_encoder"
        contents = config_json(config)
        write_json(folder / subfolder / "config.json", contents)
        theirs = "Gemma2Model" if is_text else contents["_class_name"]
        index[subfolder] = ["transformers" if is_text else "diffusers", theirs]
    save_tokenizer(checkpoint.tokenizer, folder / "tokenizer")
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "flow_shift": checkpoint.flow_shift,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
    }
    if checkpoint.dit.is_sprint:
        scheduler = {"_class_name": SCM, "prediction_type": "trigflow", "sigma_data": SIGMA_DATA}
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", index)  # last: it makes the folder a checkpoint


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")


def component_names(folder: Path) -> list[str]:
    """Returns the names of the networks that a folder of its kind holds. Raises UserError."""
    whole = _is_pipeline(folder)
    contents = read_json(folder / ("model_index.json" if whole else "config.json"))
    kind = contents.get("_class_name")
    for mark, name in UNSUPPORTED.items():
        if mark in str(kind):
            raise UserError(f"{folder} is a {name} checkpoint ({kind}), which is not supported")
    if kind in (("SanaPipeline", *SPRINT) if whole else ("AutoencoderDC",)):
        return list(COMPONENTS) if whole else ["vae"]
    theirs = str(contents.get("model_name"))
    if not whole and theirs.startswith("dc-ae"):
        raise UserError(
            f"{folder} is an autoencoder in its authors' own layout, which is not supported: give"
            f" the one for diffusers, mit-han-lab/{theirs}-diffusers"
        )
    if not whole and (folder.parent / "model_index.json").is_file():
        raise UserError(f"{folder} is a part of a checkpoint: give the whole, {folder.parent}")
    if not whole and kind == "SanaTransformer2DModel":
        return ["dit"]
    raise UserError(
        f"{folder} is {f'a {kind} checkpoint' if kind else 'a checkpoint without a _class_name'};"
        f" only SanaPipeline, {SPRINT[0]}, and AutoencoderDC alone, are supported"
    )


def provenance(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Returns where a diffusers folder is from: its name, or that on the hub and the commit."""
    made = {"source": folder.name, "layout": "diffusers"}
    if folder.parent.name == "snapshots":  # the hub's cache: models--ORG--NAME/snapshots/COMMIT
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        made |= {"source": name, "commit": folder.name}
    return made | ({"variant": variant} if variant else {})


def _is_pipeline(folder: Path) -> bool:
    """Returns True if a folder holds a whole pipeline, not an autoencoder alone."""
    return (folder / "model_index.json").is_file() or not (folder / "config.json").is_file()


def _subfolder(folder: Path, name: str) -> Path:
    return folder / COMPONENTS[name][0] if _is_pipeline(folder) else folder


def read_config(path: Path, name: str) -> Config:
    """Returns the config of a network from its config.json. Raises UserError."""
    try:
        return COMPONENTS[name][-1](read_json(path))
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: {error}") from error


def _read_scheduler(folder: Path) -> tuple[str, float]:
    """Returns the scheduler's class, and the flow shift, which means nothing to Sprint's."""
    path = folder / "scheduler_config.json"
    config = read_json(path)
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in SCHEDULERS:
        raise UserError(f"{path}: {kind} is not supported, only {', '.join(SCHEDULERS)}")
    try:
        check_supported(f"{kind} with", SCHEDULERS[kind], config)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if kind == "FlowMatchEulerDiscreteScheduler":
        logging.warning(
            "%s: diffusers draws with Euler steps here: so does sampler=flow_euler", path
        )
    key = "flow_shift" if kind == "DPMSolverMultistepScheduler" else "shift"
    return kind, number(f"{path}: {key}", config.get(key, 1.0), *SHIFTS)


def _find_weights(folder: Path, name: str, variant: str | None) -> tuple[Path, bool]:
    """Returns the weight file or the index of several, and True if it is of `variant`."""
    folder, stem = _subfolder(folder, name), COMPONENTS[name][1]

    def candidates(v: str | None):
        if v is None:
            return f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        index = f"{stem}.safetensors.index.{v}.json", f"{stem}.{v}.safetensors.index.json"
        return (f"{stem}.{v}.safetensors", *index)

    for v in (variant, None) if variant else (None,):
        for file in candidates(v):
            if (folder / file).is_file():
                return folder / file, v is not None
    # STEM.VARIANT.safetensors, STEM.VARIANT-00001-of-00002.safetensors
    parts = {p.name.removeprefix(f"{stem}.") for p in folder.glob(f"{stem}.*.safetensors")}
    variants = sorted({part.partition(".")[0].partition("-")[0] for part in parts})
    hint = ""
    if variants:
        hint = f"; there are files of variant {' and '.join(variants)}"
    elif any(folder.glob("*.bin")):
        hint = "; pickled .bin weights are not read: save them as safetensors"
    raise UserError(f"{folder} has no {candidates(variant)[0]}{hint}")
