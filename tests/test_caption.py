"""The command that describes pictures, against an endpoint on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.data.sources import open_source
from tests import PATIENCE, commands
from tests.data.bad_files import encode, picture
from tests.data.labelling.server import KEY, Server
from tests.data.test_folder import make

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    files = {f"{i}.png": encode(picture(i), "PNG") for i in range(3)}
    return make(tmp_path_factory.mktemp("photos"), files)


def test_the_command(photos, tmp_path):
    given = [photos, f"--out={tmp_path / 'out'}", "--model=a,b", "--price=1,2"]
    given += ["--verbosity=1"]  # all that a library may log
    with Server({"a": (429, [("Retry-After", "0.01")]), "b": "cut"}) as server:
        command = [sys.executable, "-m", "sana_jax.caption", f"--endpoint={server.address}"]
        command[3:3] = map(str, given)
        result = subprocess.run(
            command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert result.returncode == 0, result.stderr
    assert sum(server.answered.values()) == 6 and server.keys == {f"Bearer {KEY}"}
    last = json.loads(result.stdout.splitlines()[-1])
    tokens = {"new_captions": 6, "prompt_tokens": 5400, "completion_tokens": 66}
    cost = pytest.approx(0.005532)
    assert last == {"read": 3, "used": 3, "rejected": {}, **tokens, "dollars": cost}
    source = open_source(f"captioned:{tmp_path / 'out'}")
    assert [len(source[i]["captions"]) for i in range(3)] == [2, 2, 2]
    written = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert not any(KEY in text for text in (*written, result.stdout, result.stderr))


BAD_FLAGS = [
    (["--price=1"], "--price=1: give two numbers, such as 0.15,0.60"),
    (["--price=1,nan"], "--price=1,nan: give two numbers"),
    (["--extra=[1]"], '--extra=[1]: give a JSON object such as {"top_p": 0.9}, without'),
    (['--extra={"stream": true}'], "without model, messages, stream and n"),
    (['--extra={"top_p": NaN}'], "give a JSON object such as"),
    (["--model=a,a"], "--model=a,a: name each model once"),
    (["--captions=2", "--temperature=0"], "at --temperature=0 they would be the same"),
    (["--endpoint=localhost"], "--endpoint=localhost is no address of the web"),
    (["precomputed:x"], "precomputed:x: these are latents; give the pictures"),
    (["nowhere"], "nowhere: there is no such folder"),
    (["--out=gs://bucket/x"], "this is written to local folders only"),
    (["--per_minute=0"], "--per_minute"),
    (["--key_env=UNSET_KEY"], "--key_env=UNSET_KEY: that variable of the environment is not set"),
    (["--key_env=sk-abc"], "--key_env is no name of a variable: put the key into the environment"),
]


@pytest.fixture(scope="module")
def answers(photos, tmp_path_factory):
    """What the command answers to each of BAD_FLAGS, and to a key that the endpoint refuses."""
    path, mistakes = tmp_path_factory.mktemp("bad"), [*BAD_FLAGS, ([f"--out={photos}"], "")]
    mistakes.append((["--out=" + str(path / "refused")], ""))
    with Server((401,), (401,), (401,), (401,)) as server:
        given = [f"--out={path / 'out'}", "--model=a"]
        given += [f"--endpoint={server.address}", "--attempts=1"]
        found = commands.answers(
            "sana_jax.caption", mistakes, given, ROOT, ENVIRONMENT, str(photos)
        )
    assert not (path / "out").exists() and server.keys == {f"Bearer {KEY}"}
    return found


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(answers, flags, words):
    status, _, stderr = answers[tuple(flags)]
    assert status == 2 and words in stderr and len(stderr.splitlines()) == 1, stderr


def test_a_folder_of_others_and_a_key_that_is_refused(answers, photos):
    found = {flags[0].rpartition("/")[2]: answer for flags, answer in answers.items()}
    status, _, stderr = found[photos.name]
    assert status == 2 and "holds other files; name a new folder" in stderr
    status, _, stderr = found["refused"]
    assert status == 2 and "does not accept the key in $OPENAI_API_KEY (status 401)" in stderr
    assert stderr.count("\n") == 1 and not any(
        KEY in text for _, *each in found.values() for text in each
    )
