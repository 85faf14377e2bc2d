"""The commands into which faults are injected, and what of their results is compared."""

import json
import os
import sys
from pathlib import Path

from tests.faults import processes

INTERVAL = 4  # steps between two checkpoints
STEPS = 16


class Job:
    """A command whose result is compared with that of an unbroken run; `home` has its inputs."""

    name = module = ""
    trains, last = True, STEPS  # rows of metrics at the end, or of the manifest

    def __init__(self, home: Path):
        self.home = home / self.name

    def arguments(self, work: Path) -> list[str]:
        cache = f"--compilation_cache={self.home.parent / 'cache'}"
        return [f"--config={self.home / 'config.py'}", f"--workdir={work}", cache]

    def folder(self, work: Path) -> Path:
        """Returns the folder of the checkpoints and the metrics."""
        return work

    def rows(self, work: Path) -> list[bytes]:
        path = self.folder(work) / "metrics.jsonl"
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []

    def steps(self, work: Path) -> list[int]:
        folder = self.folder(work) / "checkpoints"
        names = os.listdir(folder) if folder.exists() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def differences(self, work: Path, unbroken: Path) -> list[str]:
        """Names what differs from the unbroken run, in what must be equal to the bit."""
        found = []
        ours, theirs = ([_timeless(json.loads(r)) for r in self.rows(w)] for w in (work, unbroken))
        if ours != theirs:
            wrong = [
                i
                for i, pair in enumerate(zip(ours, theirs, strict=False))
                if len(set(map(json.dumps, pair))) > 1
            ]
            found.append(f"metrics: {len(ours)} rows of {len(theirs)}, others at {wrong[:5]}")
        ours, theirs = (_document(self.folder(w)) for w in (work, unbroken))
        for part in "step", "leaves", "iterators":
            if ours.get(part) != theirs.get(part):
                found.append(f"last checkpoint: {part}")
        ours, theirs = (_contents(w / "model") for w in (work, unbroken))
        found += [f"model/{n}" for n in ours.keys() | theirs if ours.get(n) != theirs.get(n)]
        return found


class TextToImage(Job):
    name, module = "text_to_image", "sana_jax.train"

    def prepare(self) -> None:
        from tests.training.text_to_image import toy

        self.home.mkdir()
        config = toy.prepare(self.home)
        # What is stored trains with the least to compile.
        rows = json.loads((self.home / "base/model.json").read_text())
        rows = rows["sampler"]["text_rows"]
        text = config.read_text().replace("text_encoder.rows = 8", f"text_encoder.rows = {rows}")
        stored = f"precomputed:{self.home}/stored"
        text = text.replace(f'{str(self.home)!r} + "/photos"', repr(stored))
        text = text.replace("steps=20", f"steps={STEPS}")
        loop = f"log_every=1, checkpoint_every={INTERVAL}, evaluate_every={INTERVAL * 2}"
        config.write_text(text.replace("log_every=5, checkpoint_every=5", loop))
        for split in "train", "test":
            precompute = ["--size=16", "--text", "--upscale", f"--split={split}"]
            precompute += [f"--checkpoint={self.home / 'base'}", f"--data={self.home / 'photos'}"]
            precompute += [f"--out={self.home / 'stored' / split}"]
            group = processes.start(
                "sana_jax.precompute", precompute, [self.home / "precompute"], cold=True
            )
            assert group.wait(600) == [] and group.processes[0].status == 0


class Numbers(Job):
    """The frame of the training commands with next to nothing in it."""

    name, module = "numbers", "tests.faults.numbers"

    def prepare(self) -> None:
        self.home.mkdir()
        loop = dict(steps=STEPS, log_every=1, checkpoint_every=INTERVAL)
        (self.home / "config.py").write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({dict(loop=loop)})\n"
        )


class Autoencoder(Job):
    name, module = "autoencoder", "sana_jax.train_dc_ae"

    def prepare(self) -> None:
        from tests.training.autoencoder import toy

        self.home.mkdir()
        config = toy.prepare(self.home)
        text = config.read_text().replace("sizes=(32, 48)", "sizes=(32,)")
        three = "8, 8, 16", "0, 1, 1", ",) * 3", '"ResBlock", "ResBlock"'
        two = "8, 16", "0, 1", ",) * 2", '"ResBlock"'
        for old, new in zip(three, two, strict=True):  # stages: half as long to compile
            text = text.replace(old, new)
        text = text.replace("steps=10", f"steps={STEPS}")
        loop = f"log_every=1, checkpoint_every={INTERVAL}, images_every={INTERVAL * 2}"
        text = text.replace("log_every=2, checkpoint_every=3, images_every=5", loop)
        last = f"    config.run = {toy.PHASES[:1]}\n    return config"
        config.write_text(text.replace("    return config", last))

    def folder(self, work: Path) -> Path:
        return work / "low_resolution"


class Sample(Job):
    name, module, trains = "sample", "sana_jax.sample", False
    last = 16

    def prepare(self) -> None:
        from tests import mini

        self.home.mkdir()
        mini.save(self.home / "checkpoint")
        prompts = "".join(f"a thing number {i}\n" for i in range(self.last))
        (self.home / "prompts.txt").write_text(prompts)

    def arguments(self, work: Path) -> list[str]:
        words = [f"--prompts={self.home / 'prompts.txt'}", "--batch_size=2", "--num_steps=20"]
        return [f"--checkpoint={self.home / 'checkpoint'}", *words, f"--out={work}"]

    def rows(self, work: Path) -> list[bytes]:
        path = work / "manifest.jsonl"
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []

    def steps(self, work: Path) -> list[int]:
        return []

    def differences(self, work: Path, unbroken: Path) -> list[str]:
        ours, theirs = (
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (work, unbroken)
        )
        return [n for n in sorted(ours.keys() | theirs) if ours.get(n) != theirs.get(n)]


JOBS = {job.name: job for job in (Numbers, TextToImage, Autoencoder, Sample)}


def _document(folder: Path) -> dict:
    steps = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()]
    if not steps:
        return {}
    return json.loads((folder / "checkpoints" / str(max(steps)) / "run/metadata").read_text())


def _contents(folder: Path) -> dict:
    """Returns the files of a model, without what says how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if "model.json" in contents:
        contents["model.json"] = _timeless(json.loads(contents["model.json"]))
    return contents


TIMES = "seconds", "images_per_second", "data_wait", "mfu"


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.endswith(TIMES)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def verify(folder: str) -> None:
    """Reads the newest checkpoint, whose arrays' sums must be those of its document."""
    from sana_jax.training.checkpoints.manager import read_newest

    for part in "params", "opt_state", "ema":
        read_newest(folder, part)


if __name__ == "__main__":
    command, path = sys.argv[1:]
    if command == "verify":
        verify(path)
    else:
        JOBS[command](Path(path)).prepare()
