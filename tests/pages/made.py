"""Runs and batch runs as their commands leave them, made in a moment."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sana_jax.training.checkpoints.document import sha256

EVIL = '</script><img src=x onerror="document.title=1"> & a "cat" \ud83c'


def run(
    folder: Path,
    rows=(),
    config: dict | None = None,
    pictures=(),
    checkpoints=(4,),
    rejected: dict | None = None,
) -> Path:
    """Writes a run's files; `pictures` are steps."""
    folder.mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for step in checkpoints if config is not None else ():
        iterator = {"step": step, "read": 80, "used": 77, "rejected": rejected or {}, "hosts": 1}
        document = {"step": step, "config": config, "iterators": [{"json": iterator}] * 2}
        path = folder / f"checkpoints/{step}/run/metadata"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(document | {"sha256": sha256(document)}))
    for step in pictures:
        picture(folder / f"images/samples_{step:08d}.png", seed=step)
    return folder


def picture(path: Path, seed: int = 0, size=(64, 32)) -> None:
    """Writes a PNG of smooth noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


def data_of(page: bytes) -> dict:
    """The data in a page."""
    text = page.decode().partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text)
