"""The native folder: our parameters under their own names, described and sealed by model.json.

A folder may lack parts that another one has, byte for byte: model.json names that folder, from its
own, and the hashes of their files. So a student is stored beside its teacher without a second
autoencoder.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sana_jax.checkpoints.components import (
    CONFIGS,
    MASKS,
    Checkpoint,
    Config,
    param_shapes,
    regrouped,
)
from sana_jax.checkpoints.mapping import Entry, check, flat_leaves, lazy_params
from sana_jax.checkpoints.tensors import TensorReader, write_tensors
from sana_jax.diffusion.flow import SHIFTS
from sana_jax.models.config import without_later
from sana_jax.runtime.checks import choice, integer, number
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_itself, local, named_file, read_json, sha256_of
from sana_jax.text.instruction import Instruction
from sana_jax.text.tokenizers import load_tokenizer, save_tokenizer

FORMAT, VERSION = "sana_jax", 1
MAX_TEXT_ROWS = 2**16  # eight times the positions of Gemma 2


def save(
    checkpoint: Checkpoint,
    folder: Path,
    max_shard_bytes: int = 5 * 10**9,
    share: Path | None = None,
) -> None:
    """Writes `checkpoint` to a new or empty `folder`; weights keep their dtype.

    Parts that the native folder `share` has too, byte for byte, are left there, and named. Raises
    UserError if it is none, or has parts of others itself.
    """
    folder = local(folder)
    theirs = {} if share is None else _files_to_share(Path(share))
    configs = checkpoint.configs()
    for name in configs:
        flat = flat_leaves(checkpoint.params[name])
        write_tensors(flat.items(), folder, name, max_shard_bytes)
    if checkpoint.tokenizer is not None:
        save_tokenizer(checkpoint.tokenizer, folder / "tokenizer")
    files = {name: sha256_of(folder / name) for name in sorted(_files(folder))}
    shared = _same_parts(files, theirs)
    for name in shared:
        (folder / name).unlink()
    if "tokenizer" in map(_part, shared):
        shutil.rmtree(folder / "tokenizer")
    where = share and {"folder": os.path.relpath(share, folder), "files": shared}
    instruction = checkpoint.instruction
    model = {
        "format": FORMAT,
        "version": VERSION,
        **{name: _described(config) for name, config in configs.items()},
        # For people and other programs: we read the autoencoder's config instead.
        "latent_channels": checkpoint.vae.latent_channels,
        "factor": checkpoint.vae.factor,
        "scaling_factor": checkpoint.vae.scaling_factor,
        "sampler": _sampler(checkpoint),
        "instruction": instruction
        and {"text": instruction.text, "sha256": instruction.sha256, "source": instruction.source},
        "provenance": checkpoint.provenance,
        "files": {name: digest for name, digest in files.items() if name not in shared},
        **({"shared": where} if shared else {}),
    }
    # Last, because model.json makes the folder a checkpoint.
    (folder / "model.json").write_text(json.dumps(model, indent=2) + "\n")


def open_folder(folder: Path) -> Checkpoint:
    """Opens the checkpoint in a folder with a model.json. Raises UserError.

    The bytes of its files are verified; the weights stay unread.
    """
    folder = Path(folder)
    checkpoint, files, shared = read_model(folder)
    verify(folder, files)
    other = folder / shared["folder"] if shared else folder
    if shared:
        _verify_shared(folder, other, shared["files"])
    for name, config in checkpoint.configs().items():
        single, index = f"{name}.safetensors", f"{name}.safetensors.index.json"
        home = other if shared and {single, index} & shared["files"].keys() else folder
        tensors = TensorReader(home / (single if (home / single).is_file() else index))
        shapes = param_shapes(config)
        entries = [Entry(path, (path,)) for path in shapes]
        check(name, entries, shapes, tensors)
        checkpoint.params[name] = regrouped(lazy_params(entries, shapes, tensors), config)
    for home, names in ((folder, files), (other, shared["files"] if shared else ())):
        if any(name.startswith("tokenizer/") for name in names):
            checkpoint.tokenizer = load_tokenizer(home / "tokenizer")
    return checkpoint


def read_model(folder: Path) -> tuple[Checkpoint, dict[str, str], dict[str, Any] | None]:
    """Returns what model.json says, and the sha256 of each file by name; see `save` for `shared`.

    Raises UserError.
    """
    path = folder / "model.json"
    model = read_json(path)
    if (model.get("format"), model.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{path} is format {model.get('format')!r} version {model.get('version')!r};"
            f" this program reads {FORMAT!r} version {VERSION}"
        )
    try:
        there = [name for name in CONFIGS if model.get(name) is not None]
        configs = {name: CONFIGS[name](**frozen(model[name])) for name in there}
        files, instruction = model["files"], model["instruction"]
        provenance, sampler = model.get("provenance", {}), model["sampler"]
        if not all(isinstance(x, dict) for x in (files, provenance)):
            raise ValueError("files and provenance are objects")
        if (shared := model.get("shared")) is not None:
            shared = {"folder": str(shared["folder"]), "files": dict(shared["files"])}
        if instruction is not None:
            sha256 = instruction["sha256"]
            instruction = Instruction(instruction["text"], instruction["source"])
            if instruction.sha256 != sha256:
                raise ValueError("the instruction's sha256 is not that of its text")
        checkpoint = Checkpoint(
            **configs,
            flow_shift=number("flow_shift", sampler["flow_shift"], *SHIFTS),
            text_rows=integer("text_rows", sampler["text_rows"], 1, MAX_TEXT_ROWS),
            unconditional_mask=choice(
                "unconditional_mask", sampler.get("unconditional_mask", MASKS[0]), MASKS
            ),
            instruction=instruction,
            provenance=provenance,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is incomplete: {error!r}") from None
    return checkpoint, files, shared


def is_whole(folder: Path) -> bool:
    """Returns True if there is a model.json, and every file that it names has its hash."""
    try:
        model = read_json(folder / "model.json")
        files, shared = model["files"], model.get("shared", {"folder": ".", "files": {}})
        homes = (folder, files), (folder / shared["folder"], shared["files"])
        pairs = [(home / name, files[name]) for home, files in homes for name in files]
        return bool(pairs) and all(sha256_of(path) == digest for path, digest in pairs)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _sampler(checkpoint: Checkpoint) -> dict[str, Any]:
    names = ["flow_shift", "text_rows"]
    if checkpoint.unconditional_mask != MASKS[0]:  # others have the fields of before
        names.append("unconditional_mask")
    return {name: getattr(checkpoint, name) for name in names}


def _described(config: Config) -> dict[str, Any]:
    return without_later(type(config), dataclasses.asdict(config))


def _files(folder: Path) -> set[str]:
    """Returns the files that are read besides model.json."""
    paths = *folder.glob("*.safetensors*"), *(folder / "tokenizer").rglob("*")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def verify(folder: Path, files: dict[str, str]) -> None:
    """Checks that the files to read are those in model.json, byte for byte. Raises UserError."""
    for name, digest in files.items():
        path = named_file(folder / "model.json", name)
        if sha256_of(path) != digest:
            check_itself(path)
            raise UserError(f"{path} is damaged: its sha256 is not the one in model.json")
    if loose := sorted(_files(folder) - files.keys()):
        raise UserError(
            f"{folder / loose[0]} is not in model.json: it was put there by another hand"
        )


def _files_to_share(folder: Path) -> dict[str, str]:
    _, files, shared = read_model(folder)
    if shared:
        raise UserError(f"{folder} has files of {shared['folder']}: share those of that folder")
    return files


def _part(file: str) -> str:
    """Returns the part of a checkpoint that a file is of: dit, vae, text_encoder or tokenizer."""
    return re.split(r"[/.-]", file)[0]  # of NAME.safetensors, NAME-00001-of-..., or NAME/...


def _same_parts(files: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """Returns those of `files` whose whole part is in `theirs`, byte for byte."""
    changed = {_part(name) for name, _ in files.items() ^ theirs.items()}
    return {name: digest for name, digest in files.items() if _part(name) not in changed}


def _verify_shared(folder: Path, other: Path, files: dict[str, str]) -> None:
    """Checks the files that `folder` has from `other`. Raises UserError."""
    if not other.is_dir():
        raise UserError(f"{folder} shares files with {other}, which is not there: put it back")
    for name, digest in files.items():
        path = named_file(other / "model.json", name)
        if sha256_of(path) != digest:
            check_itself(path)
            raise UserError(f"{path} is not what {folder} shared with it: its sha256 is another")


def frozen(value):
    """Returns JSON with its lists as tuples, which our configs need."""
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, list) else value
