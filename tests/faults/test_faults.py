"""Eight trials of `python -m tests.faults`, each of another kind, and what its parts promise."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PATIENCE
from tests.faults import kinds
from tests.faults.__main__ import plan
from tests.faults.jobs import JOBS, Numbers
from tests.faults.trial import Trial

ROOT = Path(__file__).parents[2]
EIGHT = [
    (kinds.kill, "numbers", 1),
    (kinds.kill, "numbers", 2),
    (kinds.term, "numbers", 2),
    (kinds.twice, "numbers", 1),
    (kinds.rot, "numbers", 1),
    (kinds.torn, "numbers", 1),
    (kinds.disk, "numbers", 2),
    (kinds.second, "numbers", 1),
]


def faults(*flags, patience=PATIENCE):
    """Runs the command, which has its own way with JAX and so its own process."""
    command = [sys.executable, "-m", "tests.faults", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience
    )


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Returns the line of each of the eight."""
    numbers = [next(n for n in range(100) if plan(0, n) == wanted) for wanted in EIGHT]
    folder = tmp_path_factory.mktemp("faults")
    only = f"--only={','.join(map(str, numbers))}"
    result = faults(only, f"--folder={folder / 'work'}", f"--log={folder / 'log'}")
    assert (folder / "log").exists(), result.stderr
    lines = {int(line[:4]): line for line in (folder / "log").read_text().splitlines()[:8]}
    return {wanted: lines[number] for wanted, number in zip(EIGHT, numbers, strict=True)}


@pytest.mark.parametrize("wanted", EIGHT, ids=lambda key: f"{key[0].__name__}-{key[2]}")
def test_a_broken_run_ends_as_an_unbroken_one(trials, wanted):
    assert trials[wanted].endswith(" equal"), trials[wanted]


@pytest.mark.slow  # half an hour
def test_a_hundred(tmp_path):
    result = faults(f"--folder={tmp_path / 'work'}", patience=4 * 3600)
    assert result.returncode == 0, result.stdout


def test_every_hundred_holds_the_whole_plan():
    for first in 0, 100:
        drawn = [plan(0, number) for number in range(first, first + 100)]
        assert {key: drawn.count(key) for key in kinds.PLAN} == kinds.PLAN
    assert [plan(1, number) for number in range(100)] != [plan(0, n) for n in range(100)]


def finished(folder: Path, losses=(2.0, 1.0)) -> Path:
    """Writes what a training of numbers leaves."""
    (folder / "model").mkdir(parents=True)
    (folder / "checkpoints/16/run").mkdir(parents=True)
    (folder / "model/numbers.npy").write_bytes(b"numbers")
    (folder / "checkpoints/16/run/metadata").write_text('{"step": 16, "leaves": {"w": 1}}')
    rows = "".join(
        f'{{"step": {step}, "loss": {loss}, "compile_seconds": {random.random()}}}\n'
        for step, loss in enumerate(losses)
    )
    (folder / "metrics.jsonl").write_text(rows)
    return folder


def test_all_but_times_is_compared(tmp_path):
    job, unbroken = Numbers(tmp_path), finished(tmp_path / "unbroken")
    assert job.differences(finished(tmp_path / "same"), unbroken) == []
    (lost,) = job.differences(finished(tmp_path / "lost", losses=[2.0]), unbroken)
    assert lost.startswith("metrics: 1 rows of 2")
    (other,) = job.differences(finished(tmp_path / "other", losses=[2.0, 1.5]), unbroken)
    assert other.startswith("metrics: 2 rows of 2, others at [1]")
    changed = finished(tmp_path / "changed")
    (changed / "model/numbers.npy").write_bytes(b"others")
    (changed / "checkpoints/16/run/metadata").write_text('{"step": 16, "leaves": {"w": 2}}')
    assert job.differences(changed, unbroken) == ["last checkpoint: leaves", "model/numbers.npy"]


def test_a_traceback_and_a_lost_save_are_noticed(tmp_path):
    class Said:
        def __init__(self, text):
            self.said = lambda: text

    trial = Trial(JOBS["numbers"](tmp_path), 1, tmp_path / "trial", random.Random(0))
    trial.read(Said("stopped by SIGTERM after step 7 of 16: saved, the same command goes on"))
    trial.read(Said("Traceback (most recent call last):\n  ...\nKeyError: 1\n"))
    assert trial.faults == [
        "lost: step 7 is not there though it said so",
        "traceback: KeyError: 1",
    ]
