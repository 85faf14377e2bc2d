"""Measures the loader's records a second: stored latents with tokens, and decoded pictures.

    python -m tests.benchmarks.loader_throughput [--seconds=2]

Latents of 128 px and 1024 px pictures (factor 32, 32 channels, bfloat16) from ArrayRecord, with a
caption chosen by score and tokenized, with and without an instruction of 250 tokens; and PNGs of
128 px decoded and cropped. Each case runs on one thread and on two. The last line is JSON, in
records a second. Not a test.
"""

import json
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.precomputed import INDEX, Precomputed, ShardWriter, write_json
from sana_jax.data.text_image import CaptionTokens, TextImageTransform
from sana_jax.data.transforms import ImageTransform, StoredLatents
from sana_jax.runtime import cli
from sana_jax.shapes.builder import record
from sana_jax.text.tokenizers import train_tokenizer

SECONDS = flags.DEFINE_float("seconds", 2.0, "that each case is measured for")
RECORDS, BATCH, ROWS = 512, 32, 64


class Listed(list):
    """Records in memory as a source."""

    fingerprint = "listed"


def stored(records: list[dict], folder: Path, side: int) -> Precomputed:
    """Stores the records with random latents of side x side in place of their pictures."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with ShardWriter(folder, 0) as writer:
        for each in records:
            values = rng.standard_normal((side, side, 32), np.float32).astype(ml_dtypes.bfloat16)
            rest = {key: value for key, value in each.items() if key != "image"}
            writer.add(rest | {"latents": values, "scaled": True})
        entry = writer.finish({})
    index = {"format": 1, "split": "train", "scaling_factor": 1.0, "text": None}
    write_json(folder / INDEX, index | {"shards": [entry]})
    return Precomputed(folder)


def rate(source, transform, threads: int) -> float:
    """Returns the records a second after the first three batches."""
    loader = TrainingLoader(source, transform, batch_size=BATCH, threads=threads)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < SECONDS.value:
        next(batches)
        count += BATCH
    batches.close()
    return round(count / (time.monotonic() - began), 1)


def main(argv: list[str]) -> None:
    del argv
    records = [record((0, i), "train", 128, 128) for i in range(RECORDS)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [caption for each in records for caption in each["captions"]]
        tokenizer = train_tokenizer(texts, 1024, Path(folder) / "tokenizer")
        instruction = "a red circle above a blue square, " * 28
        short = CaptionTokens(tokenizer, ROWS)
        told = CaptionTokens(tokenizer, ROWS, instruction)
        scored, latents = CaptionChoice("score"), StoredLatents()
        image = ImageTransform(128, 128, crop="random", flip=True)
        small, large = (stored(records, Path(folder) / str(n), n) for n in (4, 32))
        cases = {
            "latents 4x4x32, tokens": (small, TextImageTransform(latents, short, scored)),
            "latents 32x32x32, tokens": (large, TextImageTransform(latents, short, scored)),
            "latents 32x32x32, instruction": (large, TextImageTransform(latents, told, scored)),
            "latents 32x32x32 alone": (large, latents),
            "png 128 px, tokens": (Listed(records), TextImageTransform(image, short, scored)),
            "png 128 px alone": (Listed(records), image),
        }
        found = {
            name: {threads: rate(*case, threads) for threads in (1, 2)}
            for name, case in cases.items()
        }
    for name, rates in found.items():
        print(f"{name:32}" + "".join(f"{count:10.0f}" for count in rates.values()))
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
