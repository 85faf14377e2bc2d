"""A hash that stands for a checkpoint's folder."""

import hashlib
from pathlib import Path

from sana_jax.checkpoints.diffusers import COMPONENTS

SAMPLE, SAMPLES = 4096, 256  # bytes, and how many of them a weight file is known by


def fingerprint(folder: Path) -> str:
    """The hash of what a native or a diffusers folder draws with.

    Native: of model.json, which holds the hash of every other file. Diffusers: of the configs and
    the tokenizer, and of each weight file's name, size, header and evenly spaced samples, a
    megabyte of them: enough to tell two checkpoints apart in a moment, not to find a flipped bit.
    """
    folder = Path(folder)
    if (folder / "model.json").is_file():
        return hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
    subfolders = [*(subfolder for subfolder, *_ in COMPONENTS.values()), "scheduler", "tokenizer"]
    files = [file for name in subfolders for file in (folder / name).rglob("*") if file.is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.suffix == ".safetensors":
            content = _sample(file)
        elif file.suffix == ".json" or file.parent.name == "tokenizer":
            content = file.read_bytes()
        else:
            continue
        name = file.relative_to(folder).as_posix()
        digest.update(f"{name} {file.stat().st_size} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    """The header of a safetensors file, and samples of what follows it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = 8 + min(int.from_bytes(file.read(8), "little"), size)
        parts = [file.read(header - 8)]
        for i in range(SAMPLES):
            file.seek(header + max(0, size - header - SAMPLE) * i // (SAMPLES - 1))
            parts.append(file.read(SAMPLE))
    return b"".join(parts)
