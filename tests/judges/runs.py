"""Folders as `sample` leaves them, made in a moment."""

import hashlib
import json
from pathlib import Path

import numpy as np

from sana_jax.pictures import encode_png


def write(folder: Path, prompts: list[dict], each: int, side: int = 8) -> Path:
    """Writes `each` pictures of every prompt, which may have any other fields, and their lines."""
    folder.mkdir()
    random, lines = np.random.default_rng(0), []
    for number in range(len(prompts) * each):
        file = f"{number:06d}_{number}.png"
        content = encode_png(random.integers(0, 256, (side, side, 3)).astype(np.uint8))
        (folder / file).write_bytes(content)
        own = {"file": file, "seed": number, "key": "k"}
        sha256 = hashlib.sha256(content).hexdigest()
        lines.append(own | {"sha256": sha256} | prompts[number // each])
    (folder / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[::-1]))
    return folder
