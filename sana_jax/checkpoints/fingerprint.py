"""A hash that stands for the weights, configs and tokenizer that a folder is read from."""

import hashlib
import re
from pathlib import Path

from sana_jax.checkpoints import diffusers, native


def fingerprint(folder: Path, variant: str | None = None) -> str:
    """The hash of what a native or a diffusers folder draws with.

    Native: of model.json, which holds the hash of every other file. Diffusers: of every file that
    is read for that variant, byte for byte; the hub's cache has hashed its large files already.
    """
    folder = Path(folder)
    if (folder / "model.json").is_file():
        return file_sha256(folder / "model.json")
    digest = hashlib.sha256()
    for file in diffusers.files(folder, variant):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file; a large file in the hub's cache is a link to one with that name."""
    target = path.resolve().name
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", target):
        return target
    return native.sha256_of(path)
