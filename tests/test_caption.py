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


def run(*flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "sana_jax.caption", *map(str, flags)],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_the_command(photos, tmp_path):
    given = [photos, f"--out={tmp_path / 'out'}", "--model=a,b", "--price=1,2", "--verbosity=1"]
    with Server({"a": (429, [("Retry-After", "0")]), "b": "cut"}) as server:
        result = run(*given, f"--endpoint={server.address}")
        assert result.returncode == 0, result.stderr
        again = run(*given, f"--endpoint={server.address}")  # with all that a library may log
        assert again.returncode == 0 and again.stdout == result.stdout
    assert sum(server.answered.values()) == 6 and server.keys == {f"Bearer {KEY}"}
    last = json.loads(result.stdout.splitlines()[-1])
    tokens = {"new_captions": 6, "prompt_tokens": 5400, "completion_tokens": 66}
    cost = pytest.approx(0.005532)
    assert last == {"read": 3, "used": 3, "rejected": {}, **tokens, "dollars": cost}
    source = open_source(f"captioned:{tmp_path / 'out'}")
    assert [len(source[i]["captions"]) for i in range(3)] == [2, 2, 2]
    written = [path.read_text() for path in (tmp_path / "out").iterdir()]
    assert not any(KEY in text for text in (*written, result.stdout, result.stderr, again.stderr))


def test_a_key_that_is_refused_and_an_endpoint_that_is_away(photos, tmp_path):
    given = [photos, f"--out={tmp_path / 'out'}", "--model=a", "--key_env=MINE", "--attempts=1"]
    with Server((401,)) as server:
        result = run(*given, f"--endpoint={server.address}", MINE=KEY)
        words = "does not accept the key in $MINE (status 401)"
        assert (result.returncode, result.stderr.count("\n")) == (2, 1) and words in result.stderr
        assert KEY not in result.stderr + result.stdout
    result = run(*given, f"--endpoint={server.address}", MINE=KEY)  # it is closed
    words = "does not answer in 1 tries, last ConnectError"
    assert (result.returncode, result.stderr.count("\n")) == (75, 1) and words in result.stderr


BAD_FLAGS = [
    (["--price=1"], "--price=1: give two numbers, such as 0.15,0.60"),
    (["--price=1,nan"], "--price=1,nan: give two numbers"),
    (["--extra=[1]"], '--extra=[1]: give a JSON object such as {"top_p": 0.9}, without'),
    (['--extra={"stream": true}'], "without model, messages, stream and n"),
    (["--model=a,a"], "--model=a,a: name each model once"),
    (["--captions=2", "--temperature=0"], "at --temperature=0 they would be the same"),
    (["--endpoint=localhost"], "--endpoint=localhost is no address of the web"),
    (["--data=precomputed:x"], "these are latents; give the pictures"),
    (["--data=nowhere"], "nowhere: there is no such folder"),
    (["--out=gs://bucket/x"], "this is written to local folders only"),
    (["--per_minute=0"], "--per_minute"),
    (["--key_env=UNSET_KEY"], "--key_env=UNSET_KEY: that variable of the environment is not set"),
    (["--key_env=sk-abc"], "--key_env is no name of a variable: put the key into the environment"),
]


@pytest.fixture(scope="module")
def answers(photos, tmp_path_factory):
    """What the command answers to each of BAD_FLAGS; it has written nothing."""
    out = tmp_path_factory.mktemp("bad") / "out"
    given = [f"--data={photos}", f"--out={out}", "--model=a", "--endpoint=http://127.0.0.1:9/v1"]
    found = commands.answers("sana_jax.caption", BAD_FLAGS, given, ROOT, ENVIRONMENT)
    assert not out.exists()
    return found


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_flags(answers, flags, words):
    status, _, stderr = answers[tuple(flags)]
    assert status == 2 and words in stderr and len(stderr.splitlines()) == 1, stderr
