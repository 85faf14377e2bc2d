"""Compares a tar of JPEGs read into batches by us and by webdataset with Pillow; and our memory.

    python -m tests.benchmarks.tar_throughput [--pictures=384] [--rounds=3] [--members=1000000]

Each side makes uint8 batches of 32 pictures, resized to cover a square of 512 px and cropped, in
one process: webdataset's pipeline, and our loader with a thread for each core from the tar, from
Parquet, and from ArrayRecord of JPEGs and of latents. All pixels are compared first. Rounds
alternate, and the ratio is that of the medians, in pictures per second of wall time; those per
second of processor time are beside it, for a machine that does other things. Then a data set of
--members records, with captions, in tars of 10,000 is indexed in another process, whose loader
makes batches of small pictures: its largest memory. The last line is JSON. Not a test.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from array_record.python import array_record_data_source, array_record_module
from PIL import Image

from sana_jax.data.loader import EvaluationLoader
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import ImageTransform, StoredLatents
from sana_jax.runtime import cli
from tests.benchmarks.loader_throughput import stored

if __name__ == "__main__":
    PICTURES = flags.DEFINE_integer("pictures", 384, "JPEGs in the tar", lower_bound=32)
    SIDE = flags.DEFINE_integer("side", 512, "of a picture's shorter side, in pixels")
    ROUNDS = flags.DEFINE_integer("rounds", 3, "that each side is timed", lower_bound=1)
    MEMBERS = flags.DEFINE_integer("members", 1_000_000, "records for the memory; 0: not measured")
BATCH, SIZE, SHARD = 32, 512, 10_000

# Prints records, its largest memory in MB (of the whole life, but not its parent's as getrusage
# has it) and the seconds that opening took.
MEMORY = """
import re, sys, time
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import ImageTransform
began = time.monotonic()
source = open_source("webdataset:" + sys.argv[1])
opened = time.monotonic() - began
batches = iter(TrainingLoader(source, ImageTransform(16, 16), batch_size=32, threads=8))
for _ in range(100):
    next(batches)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1000
print(len(source), round(peak), round(opened, 1))
"""


class Records:
    """JPEGs in an ArrayRecord file as a source."""

    fingerprint = "records"

    def __init__(self, path: Path, pictures: list[bytes]):
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for picture in pictures:
            writer.write(picture)
        writer.close()
        self._data = array_record_data_source.ArrayRecordDataSource([str(path)])

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        image = self._data[index]
        return {"key": str(index), "image": image, "captions": [], "scores": [], "truth": ""}


def jpeg(number: int, side: int) -> bytes:
    """A picture of smooth colours and some noise, about as large as a photograph's JPEG."""
    rng = np.random.default_rng(number)
    size = (side, side * 4 // 3) if number % 2 else (side * 4 // 3, side)
    colours = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    pixels = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=90)
    return content.getvalue()


def write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def theirs(path: Path) -> Iterator[np.ndarray]:
    """Batches of webdataset and Pillow."""
    import webdataset

    def pixels(sample: dict) -> np.ndarray:
        image = sample["jpg"]
        scale = max(SIZE / image.width, SIZE / image.height)
        width, height = SIZE / scale, SIZE / scale
        left, top = (image.width - width) / 2, (image.height - height) / 2
        if scale == 1:
            left, top = round(left), round(top)
            image = image.crop((left, top, left + SIZE, top + SIZE))
        else:
            box = (left, top, left + width, top + height)
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        return np.asarray(image)

    data = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    data = data.decode("pil").map(pixels)
    return iter(data.batched(BATCH, collation_fn=np.stack))


def ours(source, transform) -> Callable[[], Iterator[np.ndarray]]:
    name = "latents" if isinstance(transform, StoredLatents) else "image"
    threads = os.cpu_count()

    def batches() -> Iterator[np.ndarray]:
        for batch in EvaluationLoader(source, transform, batch_size=BATCH, threads=threads):
            yield batch[name][batch["valid"]]

    return batches


def timed(batches: Callable[[], Iterator[np.ndarray]], count: int) -> tuple[float, float]:
    """Returns pictures a second, of wall time and of processor time."""
    began, worked = time.monotonic(), time.process_time()
    assert sum(len(batch) for batch in batches()) == count
    return count / (time.monotonic() - began), count / (time.process_time() - worked)


def memory(root: Path, members: int) -> dict[str, list[float]]:
    """Returns records, MB and seconds to open, of a first and of a second process."""
    small = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(small, "JPEG")
    texts = [b"a caption of some length, as captions are"] * SHARD
    pairs = ((f"{i:09}.jpg", small.getvalue()) for i in range(SHARD))
    texts = ((f"{i:09}.txt", text) for i, text in enumerate(texts))
    write_tar(root / "0000.tar", (each for pair in zip(pairs, texts, strict=True) for each in pair))
    for shard in range(1, members // SHARD):
        os.link(root / "0000.tar", root / f"{shard:04}.tar")
    found = {}
    for name in "without an index", "with an index":
        command = [sys.executable, "-c", MEMORY, str(root)]
        environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache")}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        found[name] = [float(value) for value in result.stdout.split()]
    return found


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder), PICTURES.value
        os.environ["XDG_CACHE_HOME"] = folder
        pictures = [jpeg(i, SIDE.value) for i in range(count)]
        write_tar(root / "x.tar", ((f"{i:06}.jpg", data) for i, data in enumerate(pictures)))
        pq.write_table(pa.table({"image": pictures}), root / "x.parquet", row_group_size=BATCH)
        blank = [{"key": str(i), "captions": [], "scores": [], "truth": ""} for i in range(count)]
        transform = ImageTransform(SIZE, SIZE)
        sides = {
            "webdataset and Pillow": lambda: theirs(root / "x.tar"),
            "tar": ours(open_source(f"webdataset:{root / 'x.tar'}"), transform),
            "Parquet": ours(open_source(f"parquet:{root / 'x.parquet'}"), transform),
            "ArrayRecord, JPEGs": ours(Records(root / "x.array_record", pictures), transform),
            "ArrayRecord, latents": ours(stored(blank, root / "latents", 16), StoredLatents()),
        }
        for name in "tar", "Parquet", "ArrayRecord, JPEGs":
            both = zip(sides["webdataset and Pillow"](), sides[name](), strict=True)
            assert all(np.array_equal(*pair) for pair in both), name
        rates = {name: [] for name in sides}
        for _ in range(ROUNDS.value):
            for name, batches in sides.items():
                rates[name].append(timed(batches, count))
        (root / "many").mkdir()
        used = memory(root / "many", MEMBERS.value) if MEMBERS.value else {}
    base = None
    shown = {}
    for name, each in rates.items():
        wall, worked = (statistics.median(rate) for rate in zip(*each, strict=True))
        base = base or wall
        shown[name] = [round(wall, 1), round(worked, 1), round(wall / base, 2)]
        print(f"{name:24}{wall:10.1f} a second{worked:10.1f} a CPU second{wall / base:8.2f} x")
    for name, (records, megabytes, seconds) in used.items():
        print(f"{name:24}{records:10.0f} records{megabytes:8.0f} MB, opened in {seconds} s")
    print(json.dumps({"rates": shown, "memory": used}))


if __name__ == "__main__":
    cli.run(main)
