"""Makes the files beside it: python -m tests.golden.make

They were made at commit 94a800c, before the package was rearranged, with the sana_jax of then. To
make one anew, check out 94a800c, and beside it this file and tests/test_same_as_before.py of the
commit that added them (git log --diff-filter=A): what today's code writes is no evidence.
"""

import gzip
import json
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from sana_jax.checkpoints import native, random_weights
from sana_jax.models.gemma2 import Gemma2Config
from tests import test_same_as_before as test
from tests import xla

ENCODER = Gemma2Config(
    vocab_size=640,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    query_pre_attn_scalar=8,
)


def write(name: str, contents) -> None:
    (test.GOLDEN / name).write_text(json.dumps(contents, indent=0, sort_keys=True) + "\n")


def prepare(folder: Path) -> None:
    """A native folder with random weights, and 16 captioned pictures a split."""
    networks = test.TRANSFORMER, test.AUTOENCODER, ENCODER
    random_weights.configs = lambda preset: networks
    native.save(random_weights.make(random_weights.TINY), folder / "base")
    rng = np.random.default_rng(0)
    for split in "train", "test":
        (folder / "photos" / split).mkdir(parents=True)
        for number in range(16):
            picture = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
            stem = folder / "photos" / split / f"{number}"
            picture.resize((20, 18), Image.BICUBIC).quantize(16).save(f"{stem}.png")
            words = "red green blue".split()[number % 3], "cat dog".split()[number % 2]
            Path(f"{stem}.txt").write_text("a {0} {1}\n{0}".format(*words))


def stop(workdir: Path) -> None:
    """Leaves of a training that came to its end what one has that stopped after step STOPPED."""
    for path in workdir.iterdir():
        if path.name in ("tensorboard", "images", "model", "results.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(workdir / "checkpoints" / f"{test.STEPS}")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[: test.STOPPED]))


def pack(folder: Path) -> None:
    """runs.tar.gz, without names and times of this machine."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with (
        (test.GOLDEN / "runs.tar.gz").open("wb") as file,
        gzip.GzipFile("", "wb", mtime=0, fileobj=file) as packed,
        tarfile.open(mode="w", fileobj=packed) as archive,
    ):
        archive.add(folder, ".", filter=plain)


def main() -> None:
    os.environ["XLA_FLAGS"] = xla.flags(devices=1)  # the files of eight are many times larger
    jax.config.update("jax_platforms", "cpu")
    files = sorted((test.ROOT / "configs").glob("*.py"))
    write("configs.json", {file.name: test.config_keys(file) for file in files})
    write("flags.json", test.command_flags())
    write("shapes.json", test.shapes_records())
    shutil.rmtree(test.GOLDEN / "drawn", ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        drawn = test.sample(Path(temporary) / "drawn")
        assert drawn.returncode == 0, drawn.stderr
        shutil.copytree(Path(temporary) / "drawn", test.GOLDEN / "drawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for name, (_, phase) in test.TRAININGS.items():
            test.run(name, folder)
            workdir = folder / name
            if phase:
                shutil.rmtree(workdir / "model")
                first = workdir / "low_resolution"
                shutil.rmtree(first / "checkpoints")
                shutil.rmtree(first / "tensorboard")
            stop(workdir / phase)
        for path in folder.rglob("commit_success.txt"):
            path.write_text("")  # Orbax names the folder there, and reads nothing
        pack(folder)
        for name in test.TRAININGS:
            write(f"{name}.json", test.run(name, folder))


if __name__ == "__main__":
    main()
