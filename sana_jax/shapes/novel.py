"""A colour that `shapes` does not have, and what it takes to teach it: twenty captioned pictures.

Yellow green is as far from the nearest of the eight colours (45 in CIELAB) as these are from one
another (46). An autoencoder that has only ever seen the eight keeps it, which cannot be said of
brown, olive, navy or maroon. Its name has words that the text encoder knows, side by side as it has
not met them: the bundled one knows no others, and a fine-tuning leaves it as it is. All else is as
in the training split, in the pictures and in the prompts that ask for it. Nothing of `shapes`
changes.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from sana_jax.pictures import encode_png
from sana_jax.runtime.files import named, new_folder
from sana_jax.shapes import captions, scene
from sana_jax.shapes.captions import Prompt
from sana_jax.shapes.draw import draw
from sana_jax.shapes.scene import SHAPES, SPLITS, Scene

NAME = "yellow green"
COLOURS = scene.COLOURS | {NAME: (0.60, 0.95, 0.10)}
HELD_OUT = frozenset((shape, NAME) for shape in SHAPES)  # of all pictures but the twenty
PICTURES = 20


def novel_scene(seed: tuple[int, ...], split: str = "train") -> Scene:
    """Returns an ordinary training scene that has one object in the new colour."""
    rng = np.random.default_rng([6 + SPLITS.index(split), len(seed), *seed])
    drawn = scene.scene((SPLITS.index(split), *seed))
    things = list(drawn.objects)
    k = rng.integers(len(things))
    shape = SHAPES[rng.integers(len(SHAPES))]
    things[k] = dataclasses.replace(things[k], shape=shape, colour=NAME)
    return dataclasses.replace(drawn, objects=tuple(things))


def prompts(count: int, seed: int = 0, split: str = "test") -> list[Prompt]:
    """Makes prompts as captions.prompts does, each of which names the new colour once."""
    return captions.prompts(count, seed, split, novel_scene)


def write_lessons(folder: str | os.PathLike, size: int = 128) -> None:
    """Writes the twenty pictures, `size` pixels a side, each with its caption in a .txt beside it.

    Raises UserError if the folder is not empty or cannot be written, Retry if the disk is full.
    """
    folder = Path(named(folder))
    with new_folder(folder):
        for k, each in enumerate(prompts(PICTURES, split="train")):
            picture = encode_png(draw(each.scene, size, size, COLOURS))
            (folder / f"{k:02}.png").write_bytes(picture)
            (folder / f"{k:02}.txt").write_text(each.text + "\n")
