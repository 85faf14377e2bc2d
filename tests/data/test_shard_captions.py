"""The captions and scores beside a tar, as SANA's own code has them."""

import json

import pytest
from etils import epath

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import BadImage
from sana_jax.data.shard_captions import ShardCaptions, beside_tar
from sana_jax.data.tar_index import read_index
from sana_jax.runtime.errors import UserError
from tests.data.test_folder import make
from tests.data.test_tar_index import write

OWN = {"captions": ["own"], "scores": [], "truth": ""}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def beside(root, files):
    path = write(root / "0.tar", "a/b.c.jpg d.jpg")
    make(root, {name: json.dumps(v, ensure_ascii=False) for name, v in files.items()})
    return ShardCaptions(beside_tar(path, [each.name for each in root.iterdir()]), read_index(path))


def test_files_of_a_tar_begin_with_its_name():
    names = "0.json 0_X.json 01.json 0.txt wids-meta.json 0.tar 10.json"
    found = beside_tar(epath.Path("x/0.tar"), names.split())
    assert [path.name for path in found] == ["0.json", "0_X.json"]


def test_kinds_of_captions_are_styles_and_have_their_scores(tmp_path):
    more = beside(
        tmp_path,
        {
            "0_Größe.json": {"a/b.c": {"Größe": "ein Kätzchen \u2028"}, "gone": {"x": "y"}},
            "0_VILA.json": {"n": 3, "d": {"VILA": "a dog"}, "a/b.c": {"VILA": "2024", "z": " "}},
            "0_VILA_clip_score.json": {"a/b.c": {"VILA": "27.10", "prompt": 26}},
            "0_stats.json": {"count": 2, "status": {"success": 2}},
        },
    )
    found = more.added(0, OWN)
    assert found["captions"] == ["own", "ein Kätzchen", "2024"]
    assert found["scores"] == [26.0, 0.0, 27.1]  # one without a score is never chosen
    styles = [each["style"] for each in json.loads(found["truth"])["captions"]]
    assert styles == ["prompt", "Größe", "VILA"]
    assert CaptionChoice("score").probabilities(found).argmax() == 2
    by_style = CaptionChoice("proportion", proportions={"Größe": 1})
    assert by_style.probabilities(found).tolist() == [0, 1, 0]
    assert more.added(1, OWN)["captions"] == ["own", "a dog"]
    assert more.added(1, OWN)["scores"] == []


def test_without_files_a_record_stays_as_it_is(tmp_path):
    more = beside(tmp_path, {"0_stats.json": {"count": 2}, "0_list.json": [1]})
    assert more.added(0, OWN) is OWN and more.digest == ""
    one = beside(tmp_path / "1", {"0_X.json": {"d": {"X": "a"}}}).digest
    assert one and beside(tmp_path / "2", {"0_X.json": {"d": {"X": "b"}}}).digest != one


@pytest.mark.parametrize("text", ["{", '{"a" 1}', '{"a": 1 "b": 2}', '{"a": {}', "x", "{1: 2}", ""])
def test_a_file_that_is_no_json(tmp_path, text):
    path = write(tmp_path / "0.tar", "a.jpg")
    make(tmp_path, {"0_X.json": text})
    with pytest.raises(UserError, match="0_X.json is not JSON"):
        ShardCaptions(beside_tar(path, ["0_X.json"]), read_index(path))


@pytest.mark.parametrize("score", ["high", None, "inf", [1]])
def test_scores_that_are_none(tmp_path, score):
    more = beside(tmp_path, {"0_X_score.json": {"d": {"X": score}}})
    with pytest.raises(BadImage, match="0_X_score.json: .* is no finite number"):
        more.added(1, OWN)


def test_a_file_that_changes_under_us(tmp_path):
    more = beside(tmp_path, {"0_X.json": {"d": {"X": "a"}}})
    (tmp_path / "0_X.json").write_text("{}")
    with pytest.raises(BadImage, match="0_X.json has changed"):
        more.added(1, OWN)
