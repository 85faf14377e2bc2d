"""The command as a user meets it, on networks whose times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.checkpoints import random_weights
from sana_jax.models import flops
from tests import commands

ROOT = Path(__file__).parents[1]
# python -m sana_jax.benchmark, after some lines of setup.
MAIN = 'import runpy; runpy.run_module("sana_jax.benchmark", run_name="__main__", alter_sys=True)'


def bench(*flags, setup=""):
    start = ["-c", f"{setup}\n{MAIN}"] if setup else ["-m", "sana_jax.benchmark"]
    command = [sys.executable, *start, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def beside():
    flags = "--preset=tiny", "--size=64", "--dtype=float32", "--batch_size=2", "--repeat=2"
    steps = "--num_steps=6", "--loop_steps=2"
    result = bench(*flags, *steps, "--parts=loop", "--against=diffusers")
    assert result.returncode == 0, result.stderr
    return result


def test_both_sides_compute_the_same(beside):
    found = json.loads(beside.stdout.splitlines()[-1])
    assert set(found["parts"]) == {"loop"}
    for part, row in found["parts"].items():
        assert row["agrees"] and row["relative_error"] < 1e-5, (part, row)
        assert len(row["repetitions"]) == len(row["reference_repetitions"]) == 2
        assert row["ratio"] == pytest.approx(row["seconds"] / row["reference_seconds"])
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / row["peak_flops"])
        # Two processes: each holds a framework, neither both.
        assert 1e8 < row["peak_bytes"] < 3e9 and 1e8 < row["reference_peak_bytes"] < 3e9
    dit, *_ = random_weights.configs("tiny")
    counted = flops.captions(dit, 300) + 2 * flops.denoise(dit, 2, 2, 300)
    assert found["parts"]["loop"]["flops"] == 3 * 2 * 2 * counted
    assert found["diffusers"] and found["torch"] and found["cores"] >= 1


def test_the_table_says_what_was_done(beside):
    assert "loop: 2 steps were run, times are those times 3\n" in beside.stdout
    assert "tiny, 2 x 64 x 64 px, float32, on cpu" in beside.stdout
    assert "loop: 2 of 2: ours" in beside.stderr  # progress


def test_alone_in_bfloat16_and_with_memory():
    result = bench("--preset=tiny", "--size=32", "--repeat=1", "--parts=trunk,memory", "--steps=1")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["dtype"] == "bfloat16" and "ratio" not in found["parts"]["trunk"]
    assert found["memory"]["peak"] > found["memory"]["peak_without_text_encoder"]
    assert "theirs" not in result.stdout and "memory by XLA's compiler for cpu" in result.stdout


FAKE = """
import numpy
from sana_jax.measure import worker

class Fake:
    def __init__(self, kind, settings):
        self.kind = kind

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def ask(self, question):
        machine = dict(platform="cpu", device="cpu", cores=1, flops=8, weight_bytes=1)
        reference = dict(torch="0", diffusers="0", reference_platform="cpu")
        return dict(
            describe=machine if self.kind == "ours" else reference,
            first=(1.0, numpy.array([3.0, 4.0 if self.kind == "ours" else WRONG])),
            run=0.5 if self.kind == "ours" else 2.0,
            peak_flops=32.0,
            peak_bytes=7,
        )[question]

    def send(self, question):
        assert question == "load"

    receive = close = lambda self: None

worker.Worker = Fake
"""


@pytest.mark.parametrize("theirs, status", [("4.0", 0), ("4.1", 1), ("numpy.nan", 1)])
def test_a_wrong_answer_is_no_time(theirs, status):
    flags = "--preset=tiny", "--parts=decode", "--against=diffusers", "--dtype=float32"
    result = bench(*flags, setup=FAKE.replace("WRONG", theirs))
    assert result.returncode == status, result.stderr
    last = result.stdout.splitlines()[-1]
    row = json.loads(last, parse_constant=pytest.fail)["parts"]["decode"]  # NaN is no JSON
    assert (row["relative_error"] is None) == (theirs == "numpy.nan")
    assert row["ratio"] == 0.25 and row["flops_per_second"] == 16 and row["share_of_peak"] == 0.5
    assert row["compile_seconds"] == 0.5 and row["agrees"] == (status == 0)
    assert ("decode: THE RESULTS DIFFER" in result.stdout) == (status == 1)
    assert ("the two sides differ in decode" in result.stderr) == (status == 1)


@pytest.mark.parametrize(
    "ours, theirs, remedy", [("gpu", "cpu", "torch for the gpu"), ("cpu", "gpu", "jax for the gpu")]
)
def test_two_kinds_of_devices_are_not_compared(ours, theirs, remedy):
    """A TPU's case too, which no torch has."""
    setup = FAKE.replace("WRONG", "4.0")
    setup = setup.replace('reference_platform="cpu"', f"reference_platform={theirs!r}")
    setup = setup.replace('(platform="cpu"', f"(platform={ours!r}")
    setup = setup.replace('assert question == "load"', "assert False")  # before any weights
    result = bench("--preset=tiny", "--parts=decode", "--against=diffusers", setup=setup)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"we run on the {ours}, torch on the {theirs}: install {remedy}" in result.stderr


BAD_FLAGS = [
    (["--preset=sana_9b"], "preset 'sana_9b' is not one of tiny, tiny_sprint, sana_600m_512"),
    (["--parts=trunk,vae"], "'vae' is not one of text, trunk, loop, decode, encode, memory"),
    (["--parts="], "--parts is empty"),
    (["--preset=tiny", "--size=100"], "--size=100 is not a multiple of 32: try 96 or 128"),
    (["--size=0"], "--size=0"),
    (["--batch=0"], "--batch_size=0"),
    (["--repeat=0"], "--repeat=0"),
    (["--loop_steps=0"], "--loop_steps=0"),
    (["--dtype=int8"], "--dtype=int8"),
    (["--against=torch"], "--against=torch"),
    (["--quantise=w8", "--against=diffusers"], "--quantise=w8 rounds, and the two sides would"),
    (["--quantise=w4"], "--quantise=w4: value should be one of"),
]


@pytest.fixture(scope="module")
def answers():
    return commands.answers("sana_jax.benchmark", BAD_FLAGS, [], ROOT, os.environ)


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(answers, flags, words):
    status, stdout, stderr = answers[tuple(flags)]
    assert status == 2 and len(stderr.splitlines()) == 1, stderr
    assert words in stderr and not stdout


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_without_the_reference(package):
    absent = f"import sys; sys.modules[{package!r}] = None"
    result = bench("--preset=tiny", "--against=diffusers", setup=absent)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f"needs {package}, which is not installed" in result.stderr
