"""The command: what it refuses, and the page that it writes of a folder of pictures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands
from tests.pages import made

ROOT = Path(__file__).parents[1]
DRAWN = "tests/golden/drawn"
MISTAKES = [
    (["--out=a.html"], "DIR is missing; --help shows how to give it"),
    (["drawn"], "--out is missing"),
    (["drawn", "--out=a.jpg"], "give it a name that ends with .html"),
    (["missing", "--out=a.html"], "missing: there is no such folder"),
    (["drawn", ".", "--out=a.html"], ". has no manifest.jsonl"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "drawn").symlink_to(ROOT / DRAWN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = commands.answers("sana_jax.gallery", MISTAKES, [], folder, environment)
    assert [path.name for path in folder.iterdir()] == ["drawn"]
    return found


@pytest.mark.parametrize("arguments, words", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_status_2(answers, arguments, words):
    status, stdout, stderr = answers[tuple(arguments)]
    assert status == 2 and words in stderr and stderr.count("\n") == 1 and stdout == ""


def test_pictures_of_sample_have_a_page(tmp_path):
    out = tmp_path / "page.html"
    line = [sys.executable, "-m", "sana_jax.gallery", DRAWN, f"--out={out}"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{out}\n"), result.stderr
    (run,) = made.data_of(out.read_bytes())["runs"]
    files = sorted(path.name for path in (ROOT / DRAWN).glob("*.png"))
    assert [each["file"] for each in run["pictures"]] == files and run["common"][
        "checkpoint"
    ] == "shapes"
