"""The data set on disk: the records of the pure functions, once, whole or not at all."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sana_jax.runtime.errors import Retry, UserError
from sana_jax.shapes.builder import Shapes
from sana_jax.shapes.captions import captions
from sana_jax.shapes.dataset import open_split, prepare
from sana_jax.shapes.draw import draw
from sana_jax.shapes.scene import scene, truth

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
SMALL = dict(size=32, train=12, test=5, seed=3)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    prepare(folder, **SMALL)
    return folder


def contents(data_dir):
    """All records; the files' bytes depend on the order of fields, which protobuf leaves open."""
    return [list(open_split(data_dir, split, 32)) for split in ("train", "test")]


@pytest.mark.parametrize("split, count", [("train", 12), ("test", 5)])
def test_records_are_those_of_the_pure_functions(data_dir, split, count):
    records = open_split(data_dir, split, 32)
    assert len(records) == count == len(list(records))
    for index in range(count):
        record, drawn = records[index], scene((3, index), split)
        said = captions(drawn)
        assert {name: type(value) for name, value in record.items()} == {
            "key": str, "image": bytes, "captions": list, "scores": list, "truth": str,
        }  # fmt: skip
        picture = np.asarray(Image.open(io.BytesIO(record["image"])))
        np.testing.assert_array_equal(picture, draw(drawn, 32, 32))
        assert record["captions"] == [each.text for each in said]
        assert record["scores"] == [each.score for each in said]
        known = json.loads(record["truth"])
        assert [about["facts"] for about in known.pop("captions")] == [each.facts for each in said]
        assert known == json.loads(json.dumps(truth(drawn)))
    assert len({record["key"] for record in records}) == count


@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), None])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "*-test.array_record*"])
def test_damaged_files_are_told_and_what_to_do(data_dir, tmp_path, name, harm):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob(name)
    if harm is None:
        path.unlink()
    else:
        path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=f"^{tmp_path}/shapes/32.* is damaged .*make it again$"):
        prepare(tmp_path, **SMALL)
        list(open_split(tmp_path, "test", 32))


def test_readers_travel_to_other_processes(data_dir):
    records = open_split(data_dir, "train", 32)
    assert pickle.loads(pickle.dumps(records))[4] == records[4]


@pytest.mark.parametrize("index", [12, -1])
def test_no_record_beyond_the_last(data_dir, index):
    with pytest.raises(IndexError):
        open_split(data_dir, "train", 32)[index]


def test_a_second_call_changes_nothing(data_dir):
    folder = data_dir / "shapes/32/2.0.0"
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert str(prepare(data_dir, **SMALL)) == str(folder)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


@pytest.mark.parametrize("change", [{"train": 13}, {"test": 6}, {"seed": 4}])
def test_other_settings_are_refused(data_dir, change):
    with pytest.raises(UserError, match="holds seed=3 test=5 train=12, not .*; name another"):
        prepare(data_dir, **SMALL | change)


def test_any_size(tmp_path):
    prepare(tmp_path, size=(48, 80), train=2, test=1)
    record = open_split(tmp_path, "train", (48, 80))[1]
    picture = np.asarray(Image.open(io.BytesIO(record["image"])))
    np.testing.assert_array_equal(picture, draw(scene((0, 1)), 48, 80))


def test_tfds_knows_it(tmp_path):
    builder = tfds.builder("shapes/64", data_dir=tmp_path, train=3, test=2, seed=1)
    assert isinstance(pickle.loads(pickle.dumps(builder)), Shapes)
    builder.download_and_prepare()
    example = builder.as_data_source("train")[2]
    np.testing.assert_array_equal(example["image"], draw(scene((1, 2)), 64, 64))
    assert dict(builder.info.metadata) == {"train": 3, "test": 2, "seed": 1}


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((None, "train", 32), "needs data_dir"),
        (("{}", "train", 64), r"shapes/64/2.0.0 is not there; make it with python -m"),
        (("{}", "tests", 32), "no split 'tests'; it has t"),
    ],
)
def test_what_is_not_there(data_dir, arguments, words):
    first = arguments[0] and str(data_dir)
    with pytest.raises(UserError, match=words):
        open_split(first, *arguments[1:])


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="one record at least"):
        prepare(tmp_path, train=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name another"):
        prepare(tmp_path / "file", **SMALL)


def test_a_script_without_a_guard_and_without_tensorflow(tmp_path, data_dir):
    """The same records; neither writing nor reading loads TensorFlow where it is installed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from sana_jax.shapes.dataset import open_split, prepare\n"
        f"prepare({str(tmp_path)!r}, size=32, train=12, test=5, seed=3)\n"
        f"print(open_split({str(tmp_path)!r}, 'test', 32)[0]['key'])\n"
        "print({'jax', 'tensorflow'} & sys.modules.keys())\n"
    )
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (result.returncode, result.stdout) == (0, "test-3-0\nset()\n"), result.stderr
    assert contents(tmp_path) == contents(data_dir)


@pytest.mark.parametrize(
    "error, kind",
    [
        (OSError(28, "No space left on device"), Retry),
        (RuntimeError("Failed to finalize writing: No space left on device"), Retry),
        (RuntimeError("Failed to finalize writing: Disk quota exceeded"), Retry),
        (OSError(13, "Permission denied"), UserError),
        (RuntimeError("a bug"), RuntimeError),
    ],
)
def test_a_disk_that_does_not_do(tmp_path, monkeypatch, error, kind):
    """ArrayRecord's own threads write, and raise what they like."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("sana_jax.shapes.builder.Shapes.download_and_prepare", fail)
    with pytest.raises(kind):
        prepare(tmp_path, train=1, test=1)
