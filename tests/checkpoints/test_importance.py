"""The file of block importance, as evaluate writes it and convert reads it."""

import json

import pytest

from sana_jax.checkpoints.importance import read, write
from sana_jax.runtime.errors import UserError

FIGURES = {"checkpoint": "small", "sha256": "abc", "importance": [0.5, 0.0, 1]}


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "importance.json", FIGURES)
    return tmp_path / "importance.json"


def test_what_was_written_is_read(file):
    assert json.loads(file.read_text()) == {"task": "importance"} | FIGURES
    assert read(str(file), lambda: "abc", 3) == FIGURES["importance"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": "shapes"}, "no file that evaluate --task=importance wrote"),
        ({"importance": None}, "no file that evaluate --task=importance wrote"),
        ({"importance": [0.5, float("nan"), 1]}, "not a number of 0 or more"),
        ({"importance": [0.5, -0.1, 1]}, "not a number of 0 or more"),
        ({"importance": [0.5, True, 1]}, "not a number of 0 or more"),
        ({"importance": [0.5, "0.1", 1]}, "not a number of 0 or more"),
        ({"importance": [0.5, 0.1]}, "of 2 blocks, and --source has 3"),
        ({"sha256": "abd"}, "of other weights, 'small'"),
        ({"sha256": None}, "of other weights"),
    ],
)
def test_another_file_is_refused(file, change, words):
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=words) as error:
        read(str(file), lambda: "abc", 3)
    assert str(error.value).startswith(f"--importance={file}")


def test_no_json_and_no_file_are_refused(file):
    with pytest.raises(UserError, match="missing"):
        read(f"{file}.not", lambda: "abc", 3)
    file.write_text("block 0: 0.5")
    with pytest.raises(UserError, match="not JSON"):
        read(str(file), lambda: "abc", 3)


def test_weights_are_hashed_only_for_a_file_that_may_fit(file):
    def sha256():
        raise AssertionError("the weights were read")

    with pytest.raises(UserError, match="of 3 blocks"):
        read(str(file), sha256, 4)


def test_a_measurement_that_cannot_be_written_leaves_the_old_file(file):
    before = file.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write(file, {"importance": [float("nan")]})
    assert file.read_text() == before
    with pytest.raises(UserError, match="nowhere"):
        write(file.parent / "nowhere" / "importance.json", FIGURES)
