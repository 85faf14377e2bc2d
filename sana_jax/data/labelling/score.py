"""Scores captions by CLIP: 100 x the cosine of a picture and each of its captions.

A caption of more tokens than the network takes is cut, as OpenAI's own code can do. Pictures are
scored in batches of one size, in the order of the source, and the last batch of a block is padded;
so a run that goes on computes what an unbroken one does.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from sana_jax import sharding
from sana_jax.checkpoints.clip import CLIPCheckpoint
from sana_jax.data.encode import read_ahead
from sana_jax.data.images import BadImage, decoded
from sana_jax.data.labelling.labels import LabelWriter, line_of
from sana_jax.data.records import Record, Source
from sana_jax.data.rejections import Rejection
from sana_jax.metrics.features import on_mesh
from sana_jax.metrics.resizes import clip_input
from sana_jax.models.clip import unit
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress
from sana_jax.text.prompts import mend

DIGITS = 5  # of a score behind the point
HUNDRED = 100.0


class Scorer:
    """Scores pictures and captions on a mesh.

    Args:
      batch_size: pictures at once, and captions; rounded up to what the mesh can split.
      drop_below: pictures none of whose captions has so many points are left out.
    """

    def __init__(
        self,
        opened: CLIPCheckpoint,
        mesh: Mesh,
        dtype: str = "float32",
        batch_size: int = 64,
        drop_below: float = 0.0,
    ):
        self._opened, self._mesh, self._dtype = opened, mesh, dtype
        self._batch, self._drop_below = sharding.whole_batch(batch_size, mesh), drop_below
        self._tokenizer = opened.tokenizer()
        side, mean, std = opened.config.image_size, opened.mean, opened.std
        self._prepare = clip_input("clip", side, mean, std)
        self._networks: dict[str, Any] = {}
        self.settings = {
            "weights_sha256": opened.sha256(),
            "preprocess": {"side": side, "mean": list(mean), "std": list(std)},
            "dtype": dtype,
            "batch_size": batch_size,
            "drop_below": drop_below,
        }

    def run(self, source: Source, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        """Scores the records that are missing in a folder of labels, and returns its index.

        Raises UserError if the folder was begun with other settings, or no picture can be used.
        """
        writer = LabelWriter(folder, settings | {"clip": self.settings})
        with Progress(len(source), "picture", initial=writer.begin) as bar:
            while writer.begin < len(source):
                records = range(writer.begin, min(writer.begin + writer.block, len(source)))
                found = read_ahead(source, self._example, records, seed=0)
                groups = iter(lambda found=found: list(islice(found, self._batch)), [])
                scored = chain.from_iterable(map(self._scored, groups))
                lines, rejections, captions, total = [], [], 0, 0.0
                for number, each in zip(records, scored, strict=True):
                    bar.update()
                    if isinstance(each, Rejection):
                        rejections.append(each)
                        continue
                    record, scores = each
                    captions, total = captions + len(scores), total + sum(scores)
                    fields = (record[name] for name in ("key", "captions"))
                    lines.append(line_of(number, *fields, scores, record["truth"]))
                writer.add(lines, rejections, scored_captions=captions, sum_of_scores=total)
        return writer.finish()

    def scores(
        self, images: Float[np.ndarray, "B S S 3"], tokens: list[Int32[np.ndarray, "_ N"]]
    ) -> list[Float[np.ndarray, " _"]]:
        """Returns the points of each picture's captions, float64, for any number of both."""
        pictures = self._features("image", images)
        texts = self._features("text", np.concatenate(tokens))
        ends = np.cumsum([len(rows) for rows in tokens])[:-1]
        of_each = zip(pictures, np.split(texts, ends), strict=True)
        return [HUNDRED * (rows.astype(np.float64) @ picture) for picture, rows in of_each]

    def _example(self, record: Record, rng: Any) -> dict[str, Any]:
        """Returns a record's pixels and its captions' tokens. Raises BadImage."""
        if not record["captions"]:
            raise BadImage("bad_caption", "it has no caption")
        kept = {name: mend(record[name]) for name in ("key", "truth")}
        kept |= {"captions": [mend(caption) for caption in record["captions"]]}
        with decoded(record["image"], min_side=1) as pixels:
            image = self._prepare(pixels)
        tokens = self._opened.tokenize(kept["captions"], self._tokenizer)
        return {"record": kept, "image": image, "tokens": tokens}

    def _scored(self, found: list) -> Iterator[Rejection | tuple[dict, list[float]]]:
        """Yields each example's record and scores, or its rejection."""
        good = [each for each in found if not isinstance(each, Rejection)]
        points = iter([])
        if good:
            images = np.stack([each["image"] for each in good])
            points = iter(self.scores(images, [each["tokens"] for each in good]))
        for each in found:
            if isinstance(each, Rejection):
                yield each
                continue
            scores = [round(float(score), DIGITS) for score in next(points)]
            if self._drop_below and max(scores) < self._drop_below:  # scores may be negative
                why = f"low_score: its best caption has {max(scores):.2f} points"
                yield Rejection(each["record"]["key"], "low_score", why)
            else:
                yield each["record"], scores

    def _features(self, kind: str, rows: np.ndarray) -> Float[np.ndarray, "B E"]:
        """Returns vectors of length one, batch by batch; the last is padded by its last row."""
        network, found = self._network(kind), []
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            padding = np.repeat(part[-1:], self._batch - len(part), 0)
            found.append(np.asarray(network(np.concatenate([part, padding])))[: len(part)])
        features = np.concatenate(found)
        if not np.isfinite(features).all():
            raise UserError(
                f"{self._opened.folder} computes NaN or infinite features: its weights are not"
                " those of a trained model, or need another --dtype"
            )
        return features

    def _network(self, kind: str):
        """Returns one of the towers; the weights are read when the first is asked for."""
        if not self._networks:
            params = {"params": self._opened.place(self._mesh, self._dtype)}
            module = self._opened.module(self._dtype)

            def encode(method, params, rows):
                return unit(module.apply(params, rows, method=method))

            for name in ("image", "text"):
                apply = partial(encode, f"encode_{name}")
                self._networks[name] = on_mesh(apply, params, self._mesh)
        return self._networks[kind]
