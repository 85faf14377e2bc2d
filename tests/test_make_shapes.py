"""The command, its flags, and what is left of one that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_jax.runtime.errors import UserError
from sana_jax.shapes.dataset import open_split, prepare
from sana_jax.shapes.draw import draw
from sana_jax.shapes.scene import scene
from tests.shapes.test_dataset import SMALL, contents

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def command(*flags):
    return [sys.executable, "-m", "sana_jax.make_shapes", *map(str, flags)]


def run(*flags):
    return subprocess.run(command(*flags), capture_output=True, text=True)


def test_command(tmp_path):
    flags = (f"--data_dir={tmp_path}", "--size=32", "--train=3", "--test=2")
    result = run(*flags, f"--preview={tmp_path / 'sheet.png'}")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "shapes/32/2.0.0"
    assert result.stdout == f"{folder}: train, 3 records\n{folder}: test, 2 records\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "sheet.png"]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(sheet[4:36, 4:36], draw(scene((0, 0)), 32, 32))


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--data_dir is missing"),
        (["--data_dir=d", "--size=8"], "--size"),
        (["--data_dir=d", "--sizes=64"], "did you mean --size?"),
        (["--data_dir=d", "--preview=no/such/folder.png"], "--preview"),
        (["--data_dir=d", "--novel=n"], "--data_dir is not for --novel"),
        (["--novel=n", "--seed=1"], "--seed is not for --novel"),
        (["--novel="], "--novel= is empty"),
    ],
)
def test_bad_flags(tmp_path, flags, words):
    """One line, and nothing written."""
    result = subprocess.run(
        command(*flags), cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 2 and words in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_twenty_pictures_with_a_new_colour(tmp_path):
    result = run(f"--novel={tmp_path / 'lessons'}", "--size=32")
    assert result.returncode == 0, result.stderr
    made = "20 pictures with yellow green, and their captions"
    assert result.stdout == f"{tmp_path / 'lessons'}: {made}\n"
    assert len(list((tmp_path / "lessons").iterdir())) == 40
    again = run(f"--novel={tmp_path / 'lessons'}", "--size=32")
    assert again.returncode == 2 and "is not an empty folder" in again.stderr


def test_importing_defines_no_flags():
    """Other commands have flags of the same names."""
    script = (
        "from absl import flags; before = set(flags.FLAGS)\n"
        "import sana_jax.make_shapes; print(set(flags.FLAGS) - before)"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert not {"data_dir", "seed", "size"} & set(result.stdout.split("'")), result.stdout
    assert result.returncode == 0, result.stderr


def test_killed_half_way(tmp_path):
    """Nothing counts as prepared; the next call writes what an unbroken one does."""
    process = subprocess.Popen(command(f"--data_dir={tmp_path}", "--size=32", "--train=90000"))
    try:
        for _ in range(600):
            if list(tmp_path.glob("shapes/32/incomplete.*")):
                break
            time.sleep(0.1)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.glob("shapes/32/incomplete.*"))
    with pytest.raises(UserError, match="is not there"):
        open_split(tmp_path, "train", 32)
    prepare(tmp_path, **SMALL)
    prepare(tmp_path / "unbroken", **SMALL)
    assert contents(tmp_path) == contents(tmp_path / "unbroken")
