"""The TFDS builder of `shapes`; `tfds.builder("shapes/256", data_dir=DIR)` finds it once imported.

Record i of a split is scene((seed, i), split). Images are stored as encoded PNGs, so neither
writing nor reading needs TensorFlow.
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from sana_jax.pictures import encode_png
from sana_jax.runtime.progress import Progress
from sana_jax.shapes.captions import captions
from sana_jax.shapes.draw import draw
from sana_jax.shapes.scene import HELD_OUT, SPLITS, scene, truth


@dataclasses.dataclass(eq=False)
class ShapesConfig(tfds.core.BuilderConfig):
    """One size of picture, in pixels."""

    height: int = 128
    width: int = 128


def config_name(height: int, width: int) -> str:
    return f"{height}" if height == width else f"{height}x{width}"


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Captioned scenes of one to four objects, drawn from a seed.

    Args:
      train, test: the number of records of the splits, at least 1.
      seed: of all scenes; another seed gives other scenes in every record.
      config: "64", "128", "256", "512", "1024", or a ShapesConfig of another size.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "Eight shapes, eight colours, four captioners.",
        "2.0.0": "Larger objects.",
    }
    BUILDER_CONFIGS = [
        ShapesConfig(name=config_name(size, size), height=size, width=size)
        for size in (128, 64, 256, 512, 1024)  # the first is the default
    ]

    def __init__(self, *, train: int = 20_000, test: int = 1_000, seed: int = 0, **kwargs):
        self.counts, self.seed = {"train": train, "test": test}, seed
        super().__init__(file_format="array_record", **kwargs)
        self._original_state |= {"train": train, "test": test, "seed": seed}  # for pickling

    @property
    def settings(self) -> dict:
        """The settings that decide the records besides the size, stored with them."""
        return {**self.counts, "seed": self.seed}

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        features = {
            "key": tfds.features.Text(),
            "image": tfds.features.Image(
                shape=(config.height, config.width, 3), encoding_format="png"
            ),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "scores": tfds.features.Sequence(np.float32),
            "truth": tfds.features.Text(),
        }
        held_out = sorted(" ".join(reversed(kind)) for kind in HELD_OUT)
        return self.dataset_info_from_configs(
            description=f"{__doc__} In the test split only: {', '.join(held_out)}.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self.settings),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        config, count = self.builder_config, self.counts[split]

        def make(index: int) -> dict:
            return record((self.seed, index), split, config.height, config.width)

        with Progress(count, "image", f"shapes {split}") as progress:
            for numbered in enumerate(_in_order(make, range(count))):
                yield numbered
                progress.update()


def record(seed: tuple[int, ...], split: str, height: int, width: int) -> dict:
    """Makes one record: the picture as PNG, captions, scores, and their truth as JSON."""
    drawn = scene(seed, split)
    said = captions(drawn)
    about = [{"style": each.style, "wrong": each.wrong, "facts": each.facts} for each in said]
    return {
        "key": "-".join([split, *map(str, seed)]),
        "image": encode_png(draw(drawn, height, width)),
        "captions": [each.text for each in said],
        "scores": [each.score for each in said],
        "truth": json.dumps(truth(drawn) | {"captions": about}),
    }


def _in_order(make: Callable[[int], dict], numbers) -> Iterator[dict]:
    """Yields make(number) for each number, computed on all cores a bounded number ahead.

    Threads suffice: half of the time goes into PNG compression, which lets other threads run. They
    need no second interpreter, so this works in a notebook or a script without a guard.
    """
    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending = collections.deque()
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) > 8 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
