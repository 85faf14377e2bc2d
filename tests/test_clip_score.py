"""The command that scores captions: from a folder to a training's choice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.data.sources import open_source
from tests import commands, toy_clip
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared")
    (path / "clip").mkdir()
    toy_clip.save(path / "clip", "gelu")
    toy_clip.as_openclip(path / "clip")
    files = {f"{i}.png": encode(picture(i), "PNG") for i in range(3)}
    make(path / "photos", files | {f"{i}.txt": "a cat\nbe\n" for i in range(2)})
    return path


def test_the_command(shared):
    command = [sys.executable, "-m", "sana_jax.clip_score", str(shared / "photos")]
    command += [f"--weights={shared / 'clip'}", f"--out={shared / 'out'}", "--batch_size=2"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    scored = open_source(f"captioned:{shared / 'out'}")
    scores = [score for i in range(2) for score in scored[i]["scores"]]
    mean = pytest.approx(sum(scores) / 4, abs=1e-4)
    counted = {"read": 3, "used": 2, "rejected": {"bad_caption": 1}}
    assert last == counted | {"captions": 4, "mean_score": mean}
    assert "left out 2.png: bad_caption: it has no caption" in result.stderr


BAD_FLAGS = [
    (["--weights=nowhere"], "nowhere is no folder: give one with CLIP"),
    (["precomputed:x"], "precomputed:x: these are latents; give the pictures"),
    (["captioned:nowhere"], "nowhere has no index.json: it is no folder of captions"),
    (["--drop_below=101"], "--drop_below=101"),
    (["--fsdp=3"], "a mesh of replica=-1, fsdp=3"),
]


@pytest.fixture(scope="module")
def answers(shared):
    """What the command answers to each of BAD_FLAGS; it has written nothing."""
    given = [f"--weights={shared / 'clip'}", f"--out={shared / 'bad'}"]
    photos = str(shared / "photos")
    found = commands.answers("sana_jax.clip_score", BAD_FLAGS, given, ROOT, ENVIRONMENT, photos)
    assert not (shared / "bad").exists()
    return found


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(answers, flags, words):
    status, _, stderr = answers[tuple(flags)]
    assert status == 2 and words in stderr and len(stderr.splitlines()) == 1, stderr
