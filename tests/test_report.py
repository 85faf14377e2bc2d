"""The command: what it refuses, and the page that it writes of a run's folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands
from tests.pages import made

ROOT = Path(__file__).parents[1]
MISTAKES = [
    (["--out=a.html"], "RUN is missing; --help shows how to give it"),
    (["", "--out=a.html"], "RUN is missing"),
    (["run"], "--out is missing"),
    (["run", "--out=a.png"], "--out=a.png: a page is written; give it a name that ends with .html"),
    (["run", "--out=no/a.html"], "the folder no is not there; make it first"),
    (["missing", "--out=a.html"], "missing: there is no such folder"),
    (["empty", "--out=a.html"], "empty has no run: a run has metrics.jsonl"),
    (["run", "empty", "--out=a.html"], "empty has no run"),
    (["run", "--out=a.html", "--megabytes=0"], "--megabytes"),
    (["run", "--out=a.html", "--megabytes=nan"], "--megabytes=nan: give a number"),
    (["run", "--out=a.html", "--size=1"], "unknown flag --size"),
    (["run", "broken", "--out=a.html"], "a run cannot be read: [Errno 21] Is a directory: "),
    (["big", "--out=a.html", "--megabytes=0.1"], "--megabytes=0.1: the curves alone are"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    (path / "empty").mkdir()
    made.run(path / "run", [{"step": 1, "loss": 0.5}], {"seed": 3}, pictures=(4,))
    made.run(path / "broken")
    (path / "broken/evaluations/fid_4.txt").mkdir(parents=True)
    made.run(path / "big", [{"step": 1}], {f"key{i}": "x" * 100 for i in range(1000)})
    return path


@pytest.fixture(scope="module")
def answers(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return commands.answers("sana_jax.report", MISTAKES, [], folder, environment)


@pytest.mark.parametrize("arguments, words", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(
    answers, folder, arguments, words
):
    status, stdout, stderr = answers[tuple(arguments)]
    assert status == 2 and words in stderr and stderr.count("\n") == 1 and stdout == ""
    assert sorted(path.name for path in folder.iterdir()) == ["big", "broken", "empty", "run"]


def test_a_page_is_written_and_replaced(folder, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("an older page")
    line = [sys.executable, "-m", "sana_jax.report", f"{folder}/run", f"--out={out}"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{out}\n"), result.stderr
    (run,) = made.data_of(out.read_bytes())["runs"]
    assert run["name"] == "run" and run["config"] == {"seed": "3"}
    assert list(tmp_path.iterdir()) == [out]
