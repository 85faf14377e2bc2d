"""What is found out about a data set: counts that add up, buckets, and a second run."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.data.report import histogram, report
from sana_jax.data.sources import open_source
from sana_jax.runtime.errors import Retry, UserError
from tests.data import bad_files, formats
from tests.data.bad_files import encode
from tests.data.test_folder import make

SETTINGS = {"data": "photos"}


def grey(height, width):
    return encode(np.full((height, width, 3), 99, np.uint8), "PNG")


@pytest.fixture
def source(tmp_path):
    files = {"wide.png": grey(512, 1100), "square.png": grey(600, 600), "small.png": grey(40, 40)}
    files |= {"wide.txt": "a\nbb", "square.json": {"captions": ["ccc"], "scores": [3]}}
    files |= {name: data for name, (data, _) in bad_files.unusable().items()}
    return open_source(str(make(tmp_path / "photos", files | {"gone.txt": "of no picture"})))


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_counts_sizes_captions_and_buckets(source, out):
    found = report(source, out, SETTINGS, 512)
    expected = collections.Counter(reason for _, reason in bad_files.unusable().values())
    assert found["rejected"] == dict(expected)
    assert found["read"] == len(source) == found["used"] + sum(expected.values())
    assert found["captions_a_picture"] == {"0": 1, "1": 1, "2": 1} and found["with_scores"] == 1
    assert found["height"] == [40, 512, 600] and found["letters_of_a_caption"] == [1, 2, 3]
    assert found["buckets"] == {"352x736": 1, "512x512": 2}
    assert found["smaller_than_bucket"] == found["files_without_a_picture"] == 1
    pictures = {each["key"]: each for each in lines(out / "pictures.jsonl")}
    assert pictures["wide.png"]["bucket"] == [352, 736]
    assert [pictures[f"{name}.png"]["smaller"] for name in ("small", "square")] == [True, False]
    rejected = {each["key"]: each["reason"] for each in lines(out / "rejected.jsonl")}
    expected = {name: reason for name, (_, reason) in bad_files.unusable().items()}
    assert rejected == expected | {"gone.txt": "no_picture"}
    assert json.loads((out / "report.json").read_text()) == found
    with Image.open(out / "contact.png") as sheet:
        assert sheet.size == (3 * 130 - 2, 128)
    with Image.open(out / "aspects.png") as bars:
        assert bars.size[1] == 41 * 16


def test_bars_are_as_long_as_their_counts():
    bars = histogram([3, 0, 6], [(512, 1024), (512, 512), (1024, 512)])
    blue = (bars == [70, 130, 180]).all(-1).sum(1)
    assert blue[16:32].max() == 201 and blue[32:48].max() == 0 and blue[48:64].max() == 401


def test_a_data_set_without_a_picture_that_can_be_used(tmp_path, out):
    source = open_source(str(make(tmp_path / "photos", {"a.png": b"", "b.jpg": b"<html>"})))
    found = report(source, out, SETTINGS, 1024)
    assert (found["read"], found["used"], found["height"]) == (2, 0, None)
    assert not (out / "contact.png").exists()


class Interrupted:
    def __init__(self, source):
        self._source, self.at, self.read = source, None, []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index == self.at:
            raise Retry("the disk is away")
        self.read.append(index)
        return self._source[index]


def test_a_report_that_was_stopped_goes_on(tmp_path, out, monkeypatch):
    monkeypatch.setattr("sana_jax.data.report.PART", 8)
    tars = formats.tars(tmp_path / "tars", formats.pictures(20))
    given = open_source(f"webdataset:{tars}")
    (tmp_path / "whole").mkdir()
    whole = report(given, tmp_path / "whole", SETTINGS, 512)
    source = Interrupted(given)
    source.orphans, source.at = given.orphans, 17
    with pytest.raises(Retry):
        report(source, out, SETTINGS, 512)
    assert sorted(path.name for path in out.iterdir()) == ["parts", "settings.json"]
    (out / "parts/000001.json").write_text("[torn")
    source.at, source.read = None, []
    assert report(source, out, SETTINGS, 512) == whole
    assert sorted(source.read[: len(given) - 8]) == list(range(8, len(given)))  # then the sheet's
    contents = [
        {str(path.relative_to(at)): path.read_bytes() for path in at.rglob("*") if path.is_file()}
        for at in (out, tmp_path / "whole")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 9
    with pytest.raises(UserError, match="was begun with other settings"):
        report(source, out, {"split": "test"}, 512)
