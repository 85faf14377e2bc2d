"""A folder of labels: written block by block, read as a source."""

import io
import json
import tarfile

import pytest

from sana_jax.data.labelling import labels
from sana_jax.data.labelling.labels import LabelWriter, line_of, source_settings, with_styles
from sana_jax.data.rejections import Rejection
from sana_jax.data.sources import open_source
from sana_jax.runtime.errors import Retry, UserError
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make

COUNT = 7


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(labels, "BLOCK", 2)


@pytest.fixture
def photos(tmp_path):
    files = {f"{i}.png": encode(picture(i), "PNG") for i in range(COUNT)}
    return make(tmp_path / "photos", files)


def settings(photos, split="train", **more):
    source = open_source(str(photos), split)
    return source_settings(source, str(photos), split, None, 128) | {"kind": "test"} | more


def write(folder, settings, blocks=None):
    """Labels every record but 3; `blocks` at most."""
    folder.mkdir(exist_ok=True)
    writer = LabelWriter(folder, settings)
    while writer.begin < COUNT and blocks != 0:
        numbers = [i for i in range(writer.begin, min(writer.begin + 2, COUNT))]
        lines = [line_of(i, f"{i}.png", [f"é {i}"], [20.0 + i], "") for i in numbers if i != 3]
        bad = [Rejection("3.png", "not_described", "no") for i in numbers if i == 3]
        writer.add(lines, bad, tokens=len(lines))
        blocks = blocks and blocks - 1
    return writer.finish() if writer.begin == COUNT else writer


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_records_with_labels_are_a_source(photos, tmp_path):
    index = write(tmp_path / "out", settings(photos))
    assert index["tokens"] == COUNT - 1 and index["bad"] == {"3.png": "no"}
    assert index["counts"] | {"rejected": 0} == {"read": 7, "used": 6, "rejected": 0, "hosts": 1}
    source, plain = open_source(f"captioned:{tmp_path / 'out'}"), open_source(str(photos))
    numbers = [0, 1, 2, 4, 5, 6]
    assert len(source) == len(numbers) and source.places == plain.places
    for i, number in enumerate(numbers):
        labelled = {"captions": [f"é {number}"], "scores": [20.0 + number], "truth": ""}
        assert source[i] == plain[number] | labelled


def test_labels_of_labels(photos, tmp_path):
    write(tmp_path / "one", settings(photos))
    data = f"captioned:{tmp_path / 'one'}"
    source = open_source(data)
    (tmp_path / "two").mkdir()
    writer = LabelWriter(tmp_path / "two", source_settings(source, data, "train", None, 128))
    for begin in 0, 2, 4:
        lines = [line_of(i, source[i]["key"], [f"{i}"], [], "{}") for i in (begin, begin + 1)]
        writer.add(lines, [])
    writer.finish()
    again = open_source(f"captioned:{tmp_path / 'two'}")
    assert [again[i]["captions"] for i in range(6)] == [[f"{i}"] for i in range(6)]
    assert again[3]["key"] == "4.png" and again.fingerprint != source.fingerprint


def test_labels_of_a_tar_that_is_named_from_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open("train.tar", "w") as tar:
        for i in range(2):
            data = encode(picture(i), "PNG")
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source, out = open_source("webdataset:train.tar"), tmp_path / "out"
    out.mkdir()
    where = "webdataset:train.tar", "train", None, 128
    writer = LabelWriter(out, source_settings(source, *where))
    writer.add([line_of(i, source[i]["key"], [f"{i}"], [], "") for i in range(2)], [])
    writer.finish()
    expected = [source[i] | {"captions": [f"{i}"]} for i in range(2)]
    monkeypatch.chdir("/")
    labelled = open_source(f"captioned:{out}")
    assert [labelled[i] for i in range(2)] == expected


def test_the_lines_beside_pictures_are_their_captions(photos, tmp_path):
    write(tmp_path / "out", settings(photos))
    (tmp_path / "out" / labels.LINES).rename(photos / "metadata.jsonl")
    source = open_source(str(photos))
    assert source[2]["captions"] == ["é 2"] and source[2]["scores"] == [22.0]


def test_whatever_a_kill_leaves_is_continued(photos, tmp_path):
    write(tmp_path / "whole", settings(photos))
    whole = files_of(tmp_path / "whole")
    assert set(whole) == {"index.json", "metadata.jsonl", "settings.json"}
    for blocks in range(1, 4):
        out = tmp_path / f"{blocks}"
        assert write(out, settings(photos), blocks).begin == 2 * blocks
        part = out / "metadata.jsonl.part"
        part.write_bytes(part.read_bytes() + b'{"record": 4, "fi')  # before blocks.json
        write(out, settings(photos))
        assert files_of(out) == whole
    # Between the files that are written last.
    (out / "metadata.jsonl").rename(out / "metadata.jsonl.part")
    (out / "blocks.json").write_text("[]")
    write(out, settings(photos))
    assert files_of(out) == whole
    # A block that is damaged is made anew, and those after it.
    out = tmp_path / "damaged"
    write(out, settings(photos), 3)
    content = bytearray((out / "metadata.jsonl.part").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "metadata.jsonl.part").write_bytes(content)
    assert LabelWriter(out, settings(photos)).begin == 2
    write(out, settings(photos))
    assert files_of(out) == whole


def test_data_that_moved_is_found_at_its_new_place(photos, tmp_path):
    write(tmp_path / "out", settings(photos))
    photos.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="photos: there is no such folder"):
        open_source(f"captioned:{tmp_path / 'out'}")
    with pytest.raises(Retry):
        open_source(f"captioned:{tmp_path / 'out'}", resumes=True)
    write(tmp_path / "out", settings(tmp_path / "moved"))
    assert open_source(f"captioned:{tmp_path / 'out'}")[0]["key"] == "0.png"


def test_what_is_no_whole_folder_of_labels(photos, tmp_path):
    def refused(words):
        with pytest.raises(UserError, match=words) as error:
            open_source(f"captioned:{tmp_path / 'out'}")
        assert "\n" not in str(error.value)

    refused("has no index.json: it is no folder of captions, or not finished")
    write(tmp_path / "out", settings(photos), 1)
    refused("has no index.json")
    with pytest.raises(UserError, match=r"other settings \(kind\)"):
        write(tmp_path / "out", settings(photos, kind="other"))
    write(tmp_path / "out", settings(photos))
    with pytest.raises(UserError, match="holds the split 'train', not 'test'"):
        open_source(f"captioned:{tmp_path / 'out'}", "test")
    lines = tmp_path / "out" / "metadata.jsonl"
    content = lines.read_bytes()
    lines.write_bytes(content.replace(b"20.0", b"30.0"))
    refused("metadata.jsonl is damaged .it was changed.; restore it")
    with pytest.raises(UserError, match="it was changed"):
        write(tmp_path / "out", settings(photos))
    lines.unlink()
    refused("metadata.jsonl is damaged .No such file")
    lines.write_bytes(content)
    (photos / "new.png").write_bytes((photos / "0.png").read_bytes())
    refused("has changed since .*out was made from it: label it anew")
    (tmp_path / "out" / "index.json").write_text('{"format": 1}')
    refused("index.json is damaged .it has no 'data'")


def test_a_first_block_without_labels_ends_the_run(photos, tmp_path):
    (tmp_path / "out").mkdir()
    writer = LabelWriter(tmp_path / "out", settings(photos))
    with pytest.raises(UserError, match="no picture can be used: 1 read, 0 used, 1 damaged; such"):
        writer.add([], [Rejection("0.png", "damaged", "no")])
    assert LabelWriter(tmp_path / "out", settings(photos)).begin == 0


def test_styles_follow_those_that_a_truth_has():
    truth = json.dumps({"scene": 1, "captions": [{"style": "short"}]})
    found = json.loads(with_styles(truth, 1, ["vlm"]))
    assert found == {"scene": 1, "captions": [{"style": "short"}, {"style": "vlm"}]}
    for other in "", "[1]", "{", '{"captions": 3}':
        found = json.loads(with_styles(other, 2, ["vlm"]))
        assert [each["style"] for each in found["captions"]] == ["own", "own", "vlm"]


def test_names_are_kept_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:name").mkdir()
    here = tmp_path.as_posix()
    expected = {
        "photos": f"{here}/photos",
        "captioned:out": f"captioned:{here}/out",
        "webdataset:a.tar::/b/{0..9}.tar": f"webdataset:{here}/a.tar::/b/{{0..9}}.tar",
        "webdataset:/a.tar::b.tar": f"webdataset:/a.tar::{here}/b.tar",
        "odd:name": f"{here}/odd:name",
        "gs://bucket/x": "gs://bucket/x",
        "captioned:gs://bucket/x": "captioned:gs://bucket/x",
    }
    assert {name: labels._absolute_name(name) for name in expected} == expected
    assert labels._absolute_name("tfds:mnist") == "tfds:mnist"
    assert labels._absolute_name("shapes") == "shapes"
