"""Where a checkpoint's name leads: a native folder, a diffusers folder, a bundled name, the hub."""

import dataclasses
import os
import re
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from sana_jax import text
from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import Checkpoint, component_dtype, place
from sana_jax.errors import Retry, UserError
from sana_jax.files import is_full
from sana_jax.models.layers import Dtype

ASSETS = Path(__file__).parent.parent / "assets"
FLOAT16_WEIGHTS = re.compile(r"Sana_(600|1600)M_(?!.*BF16)")  # published names, see README
# One of them is in every checkpoint: native, diffusers, an autoencoder alone.
MARKERS = "model.json", "model_index.json", "config.json"
# What a hub repository holds that we read beside weights, which are fetched by their variant.
HUB_FILES = ["*.json", "tokenizer/*"]


def open_checkpoint(
    name: str,
    variant: str | None = None,
    revision: str | None = None,
    instruction_file: str | None = None,
    clip_attention: bool | None = None,
    instruct: bool = True,
) -> Checkpoint:
    """The checkpoint that `name` stands for, checked, its weights unread. Raises UserError.

    `clip_attention` replaces the transformer's own choice, where it is not None. `instruct`: with
    the complex human instruction, and a warning where none is found.
    """
    folder = find(name, revision, variant)
    given = text.find_instruction(instruction_file) if instruction_file else None
    if (folder / "model.json").is_file():
        if variant:
            raise UserError(f"{folder} is a native folder, which has no variants")
        checkpoint = native.open_folder(folder)
        checkpoint.instruction = given or checkpoint.instruction
    else:
        checkpoint = diffusers.open_folder(folder, variant)
        if checkpoint.text_encoder is None:
            return checkpoint
        checkpoint.instruction = given or text.find_instruction()
        if instruct and checkpoint.instruction is None:
            logging.warning(
                "No complex human instruction was found, which this checkpoint was trained with: "
                "pass --instruction_file, or install diffusers, for the pictures it is known for; "
                "where a command has no such flag, convert the checkpoint with it first."
            )
    if not instruct:
        checkpoint.instruction = None
    if checkpoint.instruction:
        found = checkpoint.instruction
        logging.info("instruction %s from %s", found.sha256[:12], found.source)
    if clip_attention is not None and checkpoint.dit is not None:
        checkpoint.dit = dataclasses.replace(checkpoint.dit, clip_attention=clip_attention)
    return checkpoint


def warn_of_float16(checkpoint: Checkpoint, name: str) -> None:
    """One line where weights were trained in float16 and nothing clips their attention."""
    made = checkpoint.provenance
    told = made.get("variant") == "fp16" or FLOAT16_WEIGHTS.search(str(made.get("source")))
    if told and checkpoint.dit is not None and checkpoint.dit.clip_attention is None:
        logging.warning(
            "%s was trained in float16, which clips its attention: take that as dtype, or set"
            " clip_attention, for the pictures it is known for",
            name,
        )


def load(name: str, dtype: Dtype, mesh: Mesh, **kwargs) -> Checkpoint:
    """`open_checkpoint`, with every weight cast to `dtype` and in its place on `mesh`."""
    checkpoint = open_checkpoint(name, **kwargs)
    place_all(checkpoint, name, dtype, mesh)
    return checkpoint


def place_all(checkpoint: Checkpoint, name: str, dtype: Dtype, mesh: Mesh) -> None:
    """Reads the weights of an open checkpoint, called `name`, onto the devices of `mesh`."""
    if jnp.dtype(dtype) != jnp.float16:
        warn_of_float16(checkpoint, name)
    for component, config in checkpoint.configs().items():
        logging.info("reading %s", component)
        params, narrow = checkpoint.params[component], component_dtype(component, dtype)
        try:
            checkpoint.params[component] = place(params, config, narrow, mesh)
        except UserError as error:  # a tensor's name alone does not say where it is
            raise UserError(f"{name}, {component}: {error}") from None


def bundled() -> dict[str, Path]:
    """The checkpoints that come with the package."""
    return {path.parent.name: path.parent for path in sorted(ASSETS.glob("*/model.json"))}


def find(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a checkpoint; downloads it where `name` is a hub id.

    Raises UserError, and Retry where the hub does not answer.
    """
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"a checkpoint is named by a text, not by {name!r}")
    name = os.fspath(name)
    if "://" in name:
        raise UserError(f"{name}: checkpoints are read from local folders; copy it to one first")
    path = Path(os.path.expanduser(name))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise UserError(f"no checkpoint {name!r:.60}: {error.strerror}") from None
    if is_file and path.suffix == ".pth":
        command = f"python -m sana_jax.convert --source={name} --rest=DIR --out=NATIVE_DIR"
        raise UserError(f"{name} has to be converted before it is used: {command}")
    if is_file:
        raise UserError(f"{name} is a file; name the folder of the checkpoint that it belongs to")
    if is_folder:
        if revision:
            raise UserError(f"{name} is a folder, which has no revision {revision!r}")
        if any((path / marker).is_file() for marker in MARKERS):
            return path
        if name in bundled():  # a folder of that name holds something else, such as the data set
            return bundled()[name]
        lacks = f"{name} has neither model.json (native) nor model_index.json (diffusers)"
        if (path / "model" / "model.json").is_file():  # where a training puts it
            lacks += f": give {os.path.join(name, 'model')}"
        raise UserError(lacks)
    if name in bundled():
        return bundled()[name]
    mistyped = path.parent != Path(".") and path.parent.is_dir()  # its parent is a folder here
    if name.count("/") == 1 and not (path.is_absolute() or name.startswith(".") or mistyped):
        return _download(name, revision, variant)
    names = " or ".join(bundled()) or "none yet"
    no_hub = f"; {path.parent} is a folder here, so that it is no hub id" if mistyped else ""
    raise UserError(
        f"no checkpoint {name!r}: give a native folder, a diffusers folder, "
        f"a bundled name ({names}) or a hub id (org/name){no_hub}"
    )


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    """A hub repository in the local cache: its configs and the weights that will be read."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # we say ourselves what is missing
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    fetch = partial(huggingface_hub.snapshot_download, name, revision=revision)
    # A variant's files have its name between two dots, where plain files have one dot.
    plain = dict(allow_patterns=["*.safetensors"], ignore_patterns=["*.*.safetensors"])
    try:
        folder = Path(fetch(allow_patterns=HUB_FILES))
        if not any((folder / marker).is_file() for marker in MARKERS):
            raise UserError(
                f"{name} has no {' or '.join(MARKERS)}; of NVlabs' repositories give the one whose"
                " name ends in _diffusers, or convert a .pth file of it"
            )
        if not (folder / "model.json").is_file():
            diffusers.component_names(folder)  # raises for other kinds, before gigabytes are here
        # The commit that it is of: a branch may move on before the next call.
        fetch = partial(huggingface_hub.snapshot_download, name, revision=folder.name)
        if variant:
            fetch(allow_patterns=[f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"])
            files = folder.rglob(f"*.{variant}*.safetensors")
            there = {path.relative_to(folder).parent.as_posix() for path in files}
            if not there:
                raise UserError(f"{name} has no files of variant {variant!r}")
            if "." in there:  # an autoencoder alone: they are all that it has
                return folder
            plain["allow_patterns"] = [
                f"{part}/*.safetensors" for part, *_ in diffusers.COMPONENTS.values()
            ]
            plain["ignore_patterns"] += [f"{part}/*" for part in there]
        fetch(**plain)
        return folder
    except Exception as error:  # what carries the bytes raises errors of its own
        away = _is_away(error) and not huggingface_hub.constants.HF_HUB_OFFLINE
        if not (away or isinstance(error, HfHubHTTPError | HFValidationError | OSError)):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        message = f"{name} is no folder here, and fetching it from the hub failed: {reason}"
        raise (Retry if away else UserError)(message) from error


def _is_away(error: Exception) -> bool:
    """Whether the same download may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        return status is None or status in (408, 429) or status >= 500
    # httpx' errors of the transport are no OSErrors; hf_xet raises RuntimeError.
    lost = isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError)
    lost = lost or (isinstance(error, OSError) and is_full(error))
    return lost or type(error) is RuntimeError or type(error).__module__.startswith("httpx")
