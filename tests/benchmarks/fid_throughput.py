"""FID of a folder of pictures beside pytorch-fid's: the same pictures, the same random weights.

    python -m tests.benchmarks.fid_throughput --count=1000 --side=256

Each side is a command of its own, from its start to its figure, against the same stored statistics:
ours, pytorch-fid's, and ours again. Prints seconds on the clock and of the processor, and the
largest memory that a command held.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

THEIRS = """
import sys
import torch
from tests import references
torch.set_num_threads({threads})
data, statistics, weights = sys.argv[1:]
references.publish(weights)
fid = references.pytorch_fid.calculate_fid_given_paths
print(fid([data, statistics], 50, "cpu", 2048, {threads}))
"""


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Writes pictures of smooth patches with noise of various strengths."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (rng.integers(2, 9), rng.integers(2, 9), 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, rng.uniform(1, 30), (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06}.png")


def run(name: str, command: list[str]) -> str:
    """Runs a command, prints what it took, and returns the last line that it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed")
    clock, cores = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    memory = usage.ru_maxrss / 2**20
    print(f"{name:12} {clock:7.1f} s, {cores:7.1f} s of a core, {memory:.2f} GiB", flush=True)
    return output.strip().splitlines()[-1]


def main() -> None:
    import torch

    from tests import references

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, statistics = folder / "weights.pth", folder / "statistics.npz"
        torch.save(references.inception_weights(), weights)
        make_pictures(folder / "data", options.count, options.side)
        ours = ["-m", "sana_jax.evaluate", "--task=fid", f"--weights={weights}"]
        ours.append(f"--data={folder / 'data'}")
        run("statistics", [*ours, f"--statistics={statistics}", "--count=64"])
        # Those of many pictures, with which FID is measured, are not singular.
        with np.load(statistics) as file:
            mean, covariance = file["mu"], file["sigma"]
        covariance += np.eye(len(mean)) * np.trace(covariance) / len(mean) / 100
        np.savez(statistics, mu=mean, sigma=covariance)
        ours.append(f"--reference={statistics}")
        script = THEIRS.format(threads=os.cpu_count())
        theirs = ["-c", script, *map(str, (folder / "data", statistics, weights))]
        first = json.loads(run("ours", ours))["fid"]
        second = float(run("pytorch-fid", theirs))
        run("ours", ours)
        print(f"FID {first:.6f}, theirs {second:.6f}, relative {abs(first / second - 1):.1e}")


if __name__ == "__main__":
    main()
