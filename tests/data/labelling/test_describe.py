"""Captions of a folder from an endpoint that is slow, busy, broken and cut off."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.data.labelling import describe, labels
from sana_jax.data.labelling.describe import Answers, Describer, Price, Questions
from sana_jax.data.labelling.endpoint import Answer, Endpoint
from sana_jax.data.labelling.labels import source_settings
from sana_jax.data.sources import open_source
from sana_jax.runtime.errors import Retry, UserError
from tests import PATIENCE
from tests.data.bad_files import encode, picture
from tests.data.labelling.server import KEY, Server, caption
from tests.data.test_folder import make

ROOT = Path(__file__).parents[3]
GOOD = 11
ASKED = Questions(("small", "large"), "Describe.", captions=2, side=16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    files = {f"{i:02}.a.png": encode(picture(i), "PNG") for i in range(GOOD)}
    files |= {"01.a.txt": "its own\n", "bad.png": b"no picture", "sub/é.png": files["00.a.png"]}
    return make(tmp_path_factory.mktemp("photos"), files)


def work(server, photos, folder, questions=ASKED, price=None, concurrency=4, **options):
    folder.mkdir(exist_ok=True)
    source = open_source(str(photos))
    endpoint = Endpoint(server.address, KEY, **(dict(pause=0.001, timeout=5.0) | options))
    settings = source_settings(source, str(photos), "train", None, 128)
    return Describer(source, questions, endpoint, price).run(folder, settings, concurrency)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory):
    """The folder of a run without faults."""
    with Server() as server:
        work(server, photos, folder := tmp_path_factory.mktemp("unbroken"))
    return folder


def test_all_captions_arrive_once(photos, unbroken, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    faults = [
        {"small": (429, [("Retry-After", "0.01")]), "large": "cut"},
        {"small": "broken", "large": (500,)},
        {"small": "hang up", "large": (429,)},
        {"small": "web page", "large": "slow"},
    ]
    with Server(*faults) as server:
        index = work(server, photos, tmp_path / "out")
    source, per_picture = open_source(f"captioned:{tmp_path / 'out'}"), 4
    assert len(source) == GOOD + 1 and index["counts"]["rejected"]["not_an_image"] == 1
    assert index["new_captions"] == (GOOD + 1) * per_picture
    assert index["prompt_tokens"] == 900 * index["new_captions"]
    said = {" ".join(text.split()) for text in server.answered}
    found = [text for i in range(len(source)) for text in source[i]["captions"]]
    assert set(found) == said | {"its own"} and len(said) == GOOD * per_picture
    twice = {text for text in said if found.count(text) == 2}  # two files are one picture
    assert len(twice) == per_picture and len(found) == 1 + len(said) + len(twice)
    assert files_of(tmp_path / "out") == files_of(unbroken)
    logged = "".join(capfd.readouterr()) + caplog.text
    assert "status" not in logged and KEY not in logged
    assert all(KEY.encode() not in content for content in files_of(tmp_path / "out").values())


def test_a_record_of_the_captions(photos, unbroken):
    source, plain = open_source(f"captioned:{unbroken}"), open_source(str(photos))
    record = source[1]
    assert record["image"] == plain[1]["image"] and record["key"] == "01.a.png"
    own, *new = record["captions"]
    assert own == "its own" and len(new) == 4 and record["scores"] == []
    picture_ = describe.as_address(record["image"], 16)
    expected = [
        " ".join(caption(ASKED.question(model, i, picture_)).split())
        for model in ("small", "large")
        for i in range(2)
    ]
    assert new == expected and "(16, 13)" in new[0]
    styles = [each["style"] for each in json.loads(record["truth"])["captions"]]
    assert styles == ["own", "small", "small", "large", "large"]


def test_a_finished_folder_asks_nothing(photos, unbroken):
    before = files_of(unbroken)
    with Server() as server:
        work(server, photos, unbroken)
    assert not server.tries and files_of(unbroken) == before


def test_so_many_questions_are_asked_at_once_and_no_more(photos, tmp_path):
    with Server("slow") as server:
        work(server, photos, tmp_path, Questions(("m",), "x"), concurrency=6)
    assert 1 < server.most <= 6


def test_captions_of_its_own_are_left_out_where_they_are_not_kept(photos, tmp_path):
    with Server() as server:
        work(server, photos, tmp_path, Questions(("m",), "x", keep=False))
    record = open_source(f"captioned:{tmp_path}")[1]
    assert len(record["captions"]) == 1 and record["captions"] != ["its own"]


def test_refused_pictures_are_named_and_others_go_on(photos, tmp_path):
    def refuse(whole):
        choice = whole["choices"][0]
        if "a" in choice["message"]["content"].split()[-2]:
            return whole
        return {"choices": [choice | {"finish_reason": "content_filter"}]}

    with Server(refuse) as server:
        index = work(server, photos, tmp_path, Questions(("large",), "x"))
    counts = index["counts"]
    assert counts["read"] == counts["used"] + sum(counts["rejected"].values()) == GOOD + 2
    assert counts["rejected"]["not_described"] == GOOD + 1 - counts["used"] > 0
    whys = [why for why in index["bad"].values() if "not_described: large: the model ref" in why]
    assert len(whys) == counts["rejected"]["not_described"]


def test_an_endpoint_that_refuses_everything_ends_the_run(photos, tmp_path, monkeypatch):
    for most, words in (5, "refuses every picture, such as by small: status 400"), (99, "no pict"):
        monkeypatch.setattr(describe, "ALL_REFUSED", most)
        with Server((400,), (400,)) as server, pytest.raises(UserError, match=words):
            work(server, photos, tmp_path, Questions(("small",), "x"))
    with Server() as server:  # nothing was taken for an answer
        assert work(server, photos, tmp_path, Questions(("small",), "x"))["counts"]["used"] == 12


def test_an_endpoint_that_falls_silent_is_asked_again_by_the_next_run(photos, unbroken, tmp_path):
    fail = {"large": (500,)}
    with Server(fail, fail) as server, pytest.raises(Retry, match="does not answer in 2 tries"):
        work(server, photos, tmp_path, attempts=2, concurrency=1)
    # The thread may have begun another picture before it was told to stop.
    asked, kept = sum(server.answered.values()), (tmp_path / describe.ANSWERS).read_text()
    assert asked >= len(kept.splitlines()) >= 2
    with Server() as server:
        work(server, photos, tmp_path)
    total = 4 * (GOOD + 1)
    assert total - asked <= sum(server.answered.values()) <= total - 2
    assert files_of(tmp_path) == files_of(unbroken)


def test_a_torn_answer_is_asked_for_again(tmp_path):
    answers = Answers(tmp_path / "a", 5)
    answers.add(4, "m", 0, Answer("of a block before", 1, 1))
    answers.add(5, "m", 0, Answer("é", 2, 3))
    whole = (tmp_path / "a").read_bytes()
    for tail in b'[6, "m", 0, "x", 1, 1]', b"\0\0\n", b"[6", b'{"a": 1}\n':
        (tmp_path / "a").write_bytes(whole + tail)
        again = Answers(tmp_path / "a", 5)
        assert len(again) == 1 and again.get(5, "m", 0) == Answer("é", 2, 3)
        assert (again.read, again.written) == (2, 3)
        assert (tmp_path / "a").read_bytes() == whole


def test_the_cost(photos, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(describe.Progress, "tell", lambda self, note: told.append(note))
    with Server((500,)) as server:
        work(server, photos, tmp_path, Questions(("m",), "x"), Price(100.0, 1000.0))
    assert told[-1] == "$1.21, 10800 tokens read, 132 written, 11 tries again"


def test_questions_that_make_no_sense():
    with pytest.raises(UserError, match="--model=a,a: name each model once"):
        Questions(("a", "a"), "x")
    with pytest.raises(UserError, match="at --temperature=0 they would be the same"):
        Questions(("a",), "x", captions=2, temperature=0)
    asked = Questions(("a",), "x", extra={"max_tokens": None, "top_p": 0.9}).question("a", 1, "p")
    assert "max_tokens" not in asked and asked["top_p"] == 0.9 and asked["seed"] == 1


SCRIPT = """
import sys
from pathlib import Path
from sana_jax.data.labelling import labels
from tests.data.labelling import test_describe

labels.BLOCK = 3
test_describe.work(type("", (), {"address": sys.argv[1]}), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_bytes_of_an_unbroken_one(kills, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "BLOCK", 3)
    with Server() as server:
        work(server, photos, tmp_path / "whole")
    rng, total, statuses = random.Random(kills), 4 * (GOOD + 1), []
    process, moment = None, None

    def kill(count):
        if count == moment:
            os.kill(process.pid, signal.SIGKILL)

    faults = [{"small": (500,), "large": "cut"}]
    with Server(*faults, on_answer=kill) as server:
        for left in reversed(range(kills + 1)):
            further = rng.randint(1, total // kills)
            moment = sum(server.answered.values()) + further if left else None
            command = [sys.executable, "-c", SCRIPT, server.address, photos, tmp_path / "out"]
            process = subprocess.Popen(command, cwd=ROOT)
            statuses.append(process.wait(PATIENCE))
    assert statuses == [-signal.SIGKILL] * kills + [0]
    # Of each kill at most the four questions that were under way are asked again.
    assert total <= sum(server.answered.values()) + 4 <= total + 4 * (kills + 1)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
