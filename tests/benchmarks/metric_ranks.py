"""Do FID and its kin rank models of `shapes` as its exact scorer does? For metrics/README.md.

    python -m tests.benchmarks.metric_ranks --count=96

Draws the same held-out prompts in several qualities: few steps, little and much guidance, noise on
the transformer's weights. The exact scorer reads every picture; FID, KID, precision, recall and
CMMD compare the pictures with exact ones of other prompts, and the CLIP score with their prompts.
Prints a row for each quality, and for each figure the rank correlation (Spearman) of its order with
that of the share of facts that are right; figures of which less is better count with their sign
changed. --inception and --clip name published weights; without them the networks are random, which
measure pictures too, but not as eyes do. The last line is JSON. Not a test.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from sana_jax.runtime import cli

STEPS, GUIDANCE = 20, 2.0
QUALITIES: dict[str, dict[str, float]] = {
    "20 steps": {},
    "8 steps": {"steps": 8},
    "4 steps": {"steps": 4},
    "2 steps": {"steps": 2},
    "no guidance": {"guidance": 1.0},
    "guidance 6": {"guidance": 6.0},
    "noise 0.1": {"noise": 0.1},
    "noise 0.2": {"noise": 0.2},
    "noise 0.4": {"noise": 0.4},
}
BETTER = {"fid": -1, "kid": -1, "cmmd": -1, "precision": 1, "recall": 1, "clip_score": 1}

if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", "shapes", "model to draw with")
    _COUNT = flags.DEFINE_integer("count", 96, "prompts, and half as many exact pictures more", 8)
    _INCEPTION = flags.DEFINE_string("inception", None, "pytorch-fid's weights; default: random")
    _CLIP = flags.DEFINE_string("clip", None, "a folder of CLIP; default: a small random one")


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name))
    figures = [name for name in rows[0] if name in BETTER]
    print(f"{'':14}" + "".join(f"{name:>12}" for name in ("facts", "overall", *figures)))
    for row in rows:
        values = (row[name] for name in ("facts", "overall", *figures))
        print(f"{row['quality']:14}" + "".join(f"{value:12.4f}" for value in values))
    found = {name: correlation(rows, name) for name in figures}
    print(f"{'rank corr.':38}" + "".join(f"{found[name]:12.2f}" for name in figures))
    print(json.dumps({"rows": rows, "rank_correlation": found}))


def measure(folder: Path) -> list[dict[str, Any]]:
    """Returns the figures of every quality."""
    import jax

    from sana_jax import SanaPipeline
    from sana_jax.metrics import clip_task, fid_task
    from sana_jax.shapes.captions import prompts
    from sana_jax.shapes.draw import draw
    from sana_jax.shapes.parse import parse
    from sana_jax.shapes.score import rates, score

    pipe = SanaPipeline.from_pretrained(_CHECKPOINT.value, dtype="float32")
    side, own = pipe.native_size, pipe.params["dit"]
    asked = prompts(_COUNT.value, seed=0)
    exact = [draw(each.scene, side, side) for each in prompts(3 * _COUNT.value // 2, seed=1)]
    _write(folder / "reference", exact, [""] * len(exact))
    inception, clip = _inception(folder), _clip(folder)
    rows = []
    for quality, changes in QUALITIES.items():
        pipe.params["dit"] = jax.tree.map(_Noise(changes.get("noise", 0.0)), own)
        pictures = pipe(
            [each.text for each in asked],
            seed=list(range(len(asked))),
            num_steps=int(changes.get("steps", STEPS)),
            guidance_scale=changes.get("guidance", GUIDANCE),
            output="np",
        )
        data = folder / quality.replace(" ", "_")
        _write(data, pictures, [each.text for each in asked])
        facts = [each.facts for each in asked]
        scores = [score(f, parse(p)) for f, p in zip(facts, pictures, strict=True)]
        row = {"quality": quality} | {name: rates(scores)[name] for name in ("facts", "overall")}
        sides = dict(data=str(data), reference=str(folder / "reference"))
        sides |= dict(workdir=str(folder / "features"))
        found = fid_task.fid(fid_task.Options(**sides, weights=inception))
        found |= clip_task.image_distance(clip_task.Options(**sides, weights=clip))
        del sides["reference"]
        found |= clip_task.clip_score(clip_task.Options(**sides, weights=clip))
        rows.append(row | {name: found[name] for name in BETTER})
        print(rows[-1], flush=True)
    return rows


class _Noise:
    """Adds noise to each array of weights, relative to their spread."""

    def __init__(self, level: float):
        self._level, self._random = level, np.random.default_rng(0)

    def __call__(self, x):
        if not self._level:
            return x
        drawn = self._random.standard_normal(x.shape).astype(np.float32)
        return x + self._level * np.asarray(x).std() * drawn


def _write(folder: Path, pictures, texts: list[str]) -> None:
    from PIL import Image

    folder.mkdir()
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        Image.fromarray(np.asarray(picture)).save(folder / f"{i:05}.png")
        (folder / f"{i:05}.txt").write_text(text)


def _inception(folder: Path) -> str:
    if _INCEPTION.value:
        return _INCEPTION.value
    import torch

    from tests import references

    torch.save(references.inception_weights(), folder / "inception.pth")
    return str(folder / "inception.pth")


def _clip(folder: Path) -> str:
    if _CLIP.value:
        return _CLIP.value
    from tests import toy_clip

    (folder / "clip").mkdir()
    text = toy_clip.TOWER | dict(vocab_size=300, max_position_embeddings=77)
    vision = toy_clip.TOWER | dict(image_size=128, patch_size=16, hidden_size=64)
    text |= dict(eos_token_id=toy_clip.END, bos_token_id=toy_clip.BEGIN)
    toy_clip.save(folder / "clip", text=text, vision=vision)
    return str(folder / "clip")


def correlation(rows: list[dict[str, Any]], name: str) -> float:
    """Returns Spearman's rank correlation of a figure and the share of right facts."""
    from scipy.stats import spearmanr

    values = [BETTER[name] * row[name] for row in rows]
    return float(spearmanr(values, [row["facts"] for row in rows]).statistic)


if __name__ == "__main__":
    cli.run(main)
