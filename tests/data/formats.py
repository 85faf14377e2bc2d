"""The same pictures as a folder, as tars with and without an index, and as Parquet."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data import bad_files
from tests.data.bad_files import encode
from tests.data.test_folder import make

SHARDS = 3


def pictures(count: int) -> dict[str, bytes]:
    """Pictures by their paths: of several sizes, some in folders, some with dots in their names."""
    rng, found = np.random.default_rng(0), {}
    for i in range(count):
        height, width = 24 + 8 * (i % 3), 24 + 8 * (i % 5)
        values = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
        name = (f"{i:04}", f"cat.{i:03}", f"a/{i:04}", f"a/b.c/d.{i}", f"x.{i}.y")[
            i % 5 if i > 5 else 0
        ]
        kind = ("jpg", "png", "webp")[i % 3]
        found[f"{name}.{kind}"] = encode(image, kind.replace("jpg", "jpeg").upper())
    bad = bad_files.unusable()
    found |= {name: bad[name][0] for name in ("half.jpg", "page.jpg", "one_pixel.png")}
    return dict(sorted(found.items()))


def captions(name: str) -> dict | None:
    """What stands beside a picture; for one of seven, nothing."""
    number = sum(name.encode())
    if number % 7 == 0:
        return None
    texts = [f"a picture called {name}", f"number {number}"][: 1 + number % 2]
    return {"captions": texts, "scores": [20.0 + i for i in range(len(texts))]}


def folder(root: Path, files: dict[str, bytes]) -> Path:
    """The pictures, their captions, and captions without a picture."""
    beside = {f"{name.rpartition('.')[0]}.json": captions(name) for name in files}
    beside = {name: json.dumps(value) for name, value in beside.items() if value}
    return make(root, files | beside | {"nothing.here.json": '{"caption": "of no picture"}'})


def tars(root: Path, files: dict[str, bytes], shards: int = SHARDS) -> Path:
    """The same as tars of the package webdataset, one sample after another."""
    import webdataset

    root.mkdir()
    names = list(files)
    for shard, part in enumerate(np.array_split(np.arange(len(names)), shards)):
        with webdataset.TarWriter(str(root / f"{shard:05}.tar")) as writer:
            for i in part:
                stem, _, kind = names[i].rpartition(".")
                sample = {"__key__": stem, kind: files[names[i]]}
                if (beside := captions(names[i])) is not None:
                    sample["json"] = beside
                writer.write(sample)
            if not shard:
                writer.write({"__key__": "nothing.here", "json": {"caption": "of no picture"}})
    return root


def indexed(root: Path, tars: Path) -> Path:
    """The tars with the index that wids makes of them."""
    shutil.copytree(tars, root)
    names = sorted(path.name for path in root.glob("*.tar"))
    command = [sys.executable, "-m", "wids.wids_index", "create", "--name=x", *names]
    command += ["--output=wids-meta.json"]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


def parquet(root: Path, files: dict[str, bytes]) -> Path:
    """The same as Parquet of the package datasets, with the pictures in it."""
    import datasets

    datasets.disable_progress_bars()
    root.mkdir()
    texts = [captions(name) or {"captions": [], "scores": []} for name in files]
    columns = {
        "image": [{"bytes": data, "path": name} for name, data in files.items()],
        "captions": [each["captions"] for each in texts],
        "scores": [each["scores"] for each in texts],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.Sequence(datasets.Value("string")),
            "scores": datasets.Sequence(datasets.Value("float64")),
        }
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    data.to_parquet(str(root / "train-00000-of-00001.parquet"), batch_size=7)
    return root


def all_of_them(root: Path, count: int) -> dict[str, str]:
    """The names of the four, for open_source."""
    files = pictures(count)
    return {
        "folder": str(folder(root / "folder", files)),
        "tars": f"webdataset:{tars(root / 'tars', files)}",
        "indexed": f"webdataset:{indexed(root / 'indexed', root / 'tars')}",
        "parquet": f"parquet:{parquet(root / 'parquet', files)}",
    }


def path_of(kind: str, key: str) -> str:
    """The key that the folder has for a record: without the archive's name, and the row's."""
    return key.split("/", {"folder": 0, "tars": 1, "indexed": 1, "parquet": 2}[kind])[-1]
