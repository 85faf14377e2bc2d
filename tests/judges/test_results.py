"""The judges' result files, in the form that their programs write."""

import json

import pytest

from sana_jax.judges.results import read, table
from sana_jax.runtime.errors import UserError


def row(tag, correct, prompt):
    return {"filename": "x", "tag": tag, "correct": correct, "metadata": f'{{"p": "{prompt}"}}'}


DPG = """DPG/pictures/1, a.png, 1.0, 0.5, 0.75, 0.75, 0.75
DPG/pictures/2.png, 0.0, 0.0, 1.0, 1.0, 0.5
Model: pictures
L1 category scores:
\tglobal: 91.2
DPG-Bench score: 62.5
"""
IR = [{"id": 1, "rewards": [1.0, 0.0]}, {"id": 2, "rewards": [-1.0, -2.0]}]
HPS = """Downloading...
-----------benchmark score ----------------
run anime           27.10 \t 0.2100
run concept-art     26.90 \t 0.1000
"""


def test_figures_are_formed_as_the_judges_form_them(tmp_path):
    rows = [row("colors", True, 1), row("colors", False, 1), row("counting", False, 2)]
    (tmp_path / "g").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "d").write_text(DPG)
    (tmp_path / "i").write_text(json.dumps(IR))
    (tmp_path / "h").write_text(HPS)
    files = {"geneval": "g", "dpg": "d", "imagereward": "i", "hps": "h"}
    found = dict(read(f"{kind}:{tmp_path / name}") for kind, name in files.items())
    assert found["geneval"] == {
        "overall": 0.25,  # of 0.5 and 0
        "parts": {"colors": 0.5, "counting": 0.0},
        "pictures": 3,
        "prompts": 2,
        "right_prompts": 0.5,
    }
    assert (found["dpg"]["overall"], found["dpg"]["pictures"], found["dpg"]["prompts"]) == (
        62.5,
        8,
        2,
    )
    assert found["imagereward"]["overall"] == -0.5 and found["imagereward"]["pictures"] == 4
    assert found["hps"]["overall"] == pytest.approx(27.0)
    assert found["hps"]["parts"].keys() == {"anime", "concept-art"}
    shown = table(found)
    assert "62.5000         8        2" in shown and "concept-art" in shown


@pytest.mark.parametrize(
    "kind, content, words",
    [
        ("geneval", "", "is empty"),
        ("geneval", "{}", "line 1: it has no tag"),
        ("geneval", '{"tag": "x", "correct": 2}', "neither true nor false"),
        ("dpg", "DPG-Bench score: 80", "has no line of a grid"),
        ("dpg", "a.png, 1.0, 0.0, 0.9", "is not that of its scores"),
        ("dpg", "a.png, 1.0, 1..0", "has no line of a grid"),
        ("imagereward", "<html>", "is no list of rewards"),
        ("imagereward", '[{"id": 1}]', "is no list of rewards"),
        ("imagereward", '[{"rewards": []}]', "a prompt without a reward"),
        ("imagereward", '[{"rewards": [NaN]}]', "a prompt without a reward, or"),
        ("hps", "nothing", "has not the lines of one model"),
        ("hps", "loading the model ... 1.2.3", "has not the lines of one model"),
        ("hps", "a anime 1.0 1.0\nb photo 1.0 1.0", "has not the lines of one model"),
        ("hps", "a anime 1.0 1.0\na anime 1.0 1.0", "has style anime twice"),
    ],
)
def test_other_files_are_refused(tmp_path, kind, content, words):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError) as error:
        read(f"{kind}:{tmp_path / 'file'}")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "named", ["x", "geneval:", "clip:file", "geneval:none", "dpg:none", "imagereward:none", "hps:/"]
)
def test_bad_names_are_refused(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read(named)
    assert "UserError(" not in str(error.value)
