"""Encodes a data set into the folder that precomputed.py describes."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int32

from sana_jax import sharding
from sana_jax.checkpoints.components import Checkpoint, module_for
from sana_jax.data import precomputed
from sana_jax.data.begun import begun, write_json
from sana_jax.data.images import BadImage
from sana_jax.data.loader import attempt_record
from sana_jax.data.records import Record, Source
from sana_jax.data.rejections import Counts, Rejection
from sana_jax.data.text_image import CaptionTokens
from sana_jax.data.transforms import Transform
from sana_jax.pictures import to_float
from sana_jax.pipeline import programs
from sana_jax.pipeline.request import Tile
from sana_jax.pipeline.tiling import tiled_encode
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.progress import Progress
from sana_jax.text.prompts import mend


class Encoder:
    """Encodes batches of one size by a checkpoint's autoencoder and, if asked, its text encoder.

    Args:
      checkpoint: with its weights on `mesh`.
      dtype: of the networks' activations.
      batch: rows that are encoded at once, padded to a multiple of the mesh's batch axes.
      tokens: makes the tokens of captions; None: no captions are encoded.
      tile: size and stride in pixels of the tiles of larger images (tiling.py); None: all at once.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mesh: Mesh,
        dtype: str,
        batch: int,
        tokens: CaptionTokens | None = None,
        tile: Tile | None = None,
    ):
        self._batch = batch + -batch % sharding.batch_divisor(mesh)
        self._sharding = sharding.batch_sharding(mesh)
        params = checkpoint.params
        encode = partial(programs.encode_images, module_for(checkpoint.vae, dtype), params["vae"])
        self._encode: Callable = encode
        if tile is not None:
            size, stride = tile
            self._encode = lambda x: tiled_encode(encode, x, size, stride, checkpoint.vae.factor)
        if tokens is not None:
            network = module_for(checkpoint.text_encoder, dtype), params["text_encoder"]
            prefix = None
            if tokens.prefix:
                prefix = programs.read_prefix(*network, np.array([tokens.prefix], np.int32))

            def read(rows, mask):
                return programs.encode_text(*network, rows, prefix, tokens.window, mask)

            self._read = read

    def latents(self, images: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B h w c"]:
        """Returns the scaled latents of pixels in [-1, 1], for any batch size B."""
        return self._run(self._encode, images)

    def embeddings(
        self, tokens: Int32[np.ndarray, "B L"], mask: Bool[np.ndarray, "B rows"]
    ) -> list[Float[np.ndarray, "n T"]]:
        """Returns, for each text, the rows that its mask shows."""
        rows = self._run(self._read, tokens, mask)
        return [found[shown] for found, shown in zip(rows, mask, strict=True)]

    def _run(self, function: Callable, *inputs: np.ndarray) -> np.ndarray:
        """Calls `function` batch by batch; the last batch is padded with copies of its last row."""
        results = []
        for start in range(0, len(inputs[0]), self._batch):
            parts = [x[start : start + self._batch] for x in inputs]
            count = len(parts[0])
            parts = [np.concatenate([x, np.repeat(x[-1:], self._batch - count, 0)]) for x in parts]
            found = function(*(jax.device_put(x, self._sharding) for x in parts))
            results.append(np.asarray(found, np.float32)[:count])
        return np.concatenate(results)


class WithTokens:
    """Turns a record into the encoder's input: its pixels (uint8) and all captions' tokens."""

    def __init__(self, image: Transform, tokens: CaptionTokens | None = None):
        self._image, self._tokens = image, tokens

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        image, captions = self._image(record, rng), []
        if self._tokens is not None:
            if not record["captions"]:
                raise BadImage("bad_caption", "it has no caption")
            captions = [self._tokens(record, i) for i in range(len(record["captions"]))]
        kept = {
            "key": mend(record["key"]),
            "captions": [mend(caption) for caption in record["captions"]],
            "scores": record["scores"],
            "truth": mend(record["truth"]),
        }
        return {"record": kept, "captions": captions, **image}


def precompute(
    source: Source, transform: WithTokens, encoder: Encoder, folder: Path, settings: dict
) -> dict[str, Any]:
    """Writes the missing shards and then the index, which it returns.

    Raises UserError if the folder was begun with other settings, or if no image can be used.
    """
    settings = begun(folder, settings)
    with Progress(len(source), "image") as progress:
        for number in range(shards_of(settings)):
            if precomputed.finished_shard(folder, number) is None:
                encode_shard(source, transform, encoder, folder, settings, number, progress.update)
            else:
                progress.update(len(records_of(settings, number)))
    return write_index(folder, settings)


def shards_of(settings: dict) -> int:
    """Returns the number of shards."""
    return -(-settings["records"] // settings["shard"])


def records_of(settings: dict, shard: int) -> range:
    """Returns the numbers of the source's records that belong to a shard."""
    start = shard * settings["shard"]
    return range(start, min(start + settings["shard"], settings["records"]))


def encode_shard(
    source: Source,
    transform: WithTokens,
    encoder: Encoder,
    folder: Path,
    settings: dict,
    number: int,
    done: Callable = lambda: None,
    part: str = ".tmp",
) -> dict[str, Any]:
    """Writes a shard and returns its entry of the index; `done` is called for every record.

    Processes that may write the same shard at once must not share `part` (ShardWriter).
    """
    found = read_ahead(source, transform, records_of(settings, number), settings["seed"])
    with precomputed.ShardWriter(folder, number, part) as writer:
        counts = _encode(found, writer, encoder, settings, done)
        return writer.finish({"counts": counts.state(), "bad": counts.examples})


def write_index(folder: Path, settings: dict) -> dict[str, Any]:
    """Writes the index of a folder whose shards are complete, and returns it.

    Raises UserError if no image can be used, and Retry if a shard is missing.
    """
    shards = [precomputed.entry_of(folder, number) for number in range(shards_of(settings))]
    if missing := [number for number, entry in enumerate(shards) if entry is None]:
        raise Retry(f"{folder}: shards {missing[:10]} are missing; the same command makes them")
    total = sum((Counts.from_state(shard["counts"]) for shard in shards), Counts())
    if total.read != settings["records"]:
        raise UserError(f"{folder}: {total}, of {settings['records']} records; name a new folder")
    if not total.used:
        bad = [f"{key} ({why})" for shard in shards for key, why in shard["bad"].items()]
        raise UserError(f"no image can be used: {total}; for example {'; '.join(bad[:5])}")
    index = settings | {"shards": shards, "counts": total.state()}
    write_json(folder / precomputed.INDEX, index)
    return index


def read_ahead(source: Source, transform: Callable, records: range, seed: int) -> Iterator:
    """Yields each record's transformed example or its rejection, in order."""

    def read(index: int):
        return attempt_record(source, index, transform, np.random.default_rng((seed, index)))

    threads = min(16, os.cpu_count() or 1)
    ahead = grain.MapDataset.range(records.start, records.stop).map(read)
    return iter(ahead.to_iter_dataset(grain.ReadOptions(threads, 4 * threads)))


def _encode(found: Iterator, writer, encoder: Encoder, settings: dict, done: Callable) -> Counts:
    """Writes a shard's records in batches of one size, and counts them."""
    counts = Counts()
    waiting: dict[tuple[int, int], list[dict]] = {}  # by the size of the image

    def flush(examples: list[dict]) -> None:
        for record in _records(examples, encoder, settings["store"]):
            writer.add(record)
        counts.add(len(examples), [])

    for example in found:
        done()
        if isinstance(example, Rejection):
            counts.add(0, [example])
            continue
        size = example["image"].shape[:2]
        waiting.setdefault(size, []).append(example)
        if len(waiting[size]) == settings["batch"]:
            flush(waiting.pop(size))
    for examples in waiting.values():
        flush(examples)
    return counts


def _records(examples: list[dict], encoder: Encoder, store: str) -> Iterator[dict]:
    """Encodes a batch of WithTokens' examples, and yields the records to store."""
    latents = encoder.latents(to_float(np.stack([example["image"] for example in examples])))
    if not np.isfinite(latents).all():
        raise UserError(
            "some latents are NaN or infinite: the weights are not those of a trained autoencoder,"
            " or need another --dtype"
        )
    captions = [caption for example in examples for caption in example["captions"]]
    rows = iter([])
    if captions:
        columns = ([caption[name] for caption in captions] for name in ("tokens", "mask"))
        rows = iter(encoder.embeddings(*map(np.stack, columns)))
    for example, latent in zip(examples, latents.astype(np.dtype(store)), strict=True):
        record = example["record"] | {"latents": latent, "scaled": True}
        if captions:
            record["embeddings"] = [
                next(rows).astype(ml_dtypes.bfloat16) for _ in example["captions"]
            ]
        yield record
