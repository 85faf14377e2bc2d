"""The archives that a name stands for, and those of a split."""

import os

import pytest

from sana_jax.data.archives import expand, find, of_split
from sana_jax.data.records import NoData
from sana_jax.runtime.errors import UserError
from tests.data.test_folder import make


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("a", "a"),
        ("{0..2}", "0 1 2"),
        ("x/{008..011}.tar", "x/008.tar x/009.tar x/010.tar x/011.tar"),
        ("{a,b}{1..2}", "a1 a2 b1 b2"),
        ("{a}", "{a}"),
    ],
)
def test_braces(pattern, names):
    assert expand(pattern) == names.split()


@pytest.mark.parametrize("pattern", ["{5..1}.tar", "{0..99999999999}.tar"])
def test_braces_that_stand_for_nothing_or_too_much(pattern):
    with pytest.raises(UserError, match=f"{pattern[:5]}.*stands for nothing, or for too many"):
        expand(pattern)


@pytest.fixture
def root(tmp_path):
    names = "2.tar 10.tar a/1.TAR a/.x.tar .b/1.tar notes.txt"
    return make(tmp_path, dict.fromkeys(names.split(), b""))


@pytest.mark.parametrize(
    "spec, names",
    [
        ("{root}", "10.tar 2.tar a/1.TAR"),
        ("{root}/2.tar", "2.tar"),
        ("{root}/*.tar", "10.tar 2.tar"),
        ("{root}/*/1.*", "a/1.TAR"),
        ("{root}/{{2,10}}.tar", "2.tar 10.tar"),
        ("{root}/2.tar::{root}/a::{root}/2.tar", "2.tar a/1.TAR"),
    ],
)
def test_what_a_name_stands_for(root, spec, names):
    found = find(spec.format(root=root), ".tar")
    assert [os.path.relpath(path, root) for path in found] == names.split()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{root}/b.tar", "b.tar: there is no such file or folder"),
        ("{root}/{{00..01}}.tar", "00.tar: there is no such file"),
        ("{root}/missing/*.tar", r"\*.tar: there is no \*.tar in it"),
        ("{root}/a/.b", "there is no such file or folder"),
    ],
)
def test_what_is_not_there(root, spec, message):
    with pytest.raises(NoData, match=message):
        find(spec.format(root=root), ".tar")
    with pytest.raises(UserError, match="pipe:cat x: data is read from files"):
        find("pipe:cat x", ".tar")


@pytest.mark.parametrize(
    "files, train, test",
    [
        ("0.tar 1.tar", "0.tar 1.tar", None),
        ("cc-train-0.tar cc-train-1.tar cc-validation-0.tar", "cc-train-0.tar cc-train-1.tar",
         "cc-validation-0.tar"),
        ("data/train-00000-of-00001.parquet data/test-00000-of-00001.parquet",
         "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0.tar val/0.tar", "train/0.tar", "val/0.tar"),
        ("train2014_0.tar train2017_0.tar", "train2014_0.tar train2017_0.tar", None),
        ("0.tar val-0.tar", None, "val-0.tar"),
    ],
)  # fmt: skip
def test_splits_by_folders_and_by_the_archives_own_names(tmp_path, files, train, test):
    make(tmp_path, dict.fromkeys(files.split(), b""))
    paths = find(str(tmp_path), files[files.rindex(".") :])
    for split, names in ("train", train), ("test", test):
        if names is None:
            with pytest.raises(NoData, match=f"no split '{split}'"):
                of_split(paths, str(tmp_path), split)
        else:
            found = of_split(paths, str(tmp_path), split)
            assert [each.name for each in found] == names.split()
            assert all(each.path == tmp_path / each.name for each in found)


def test_names_begin_below_the_folder_that_all_are_in(tmp_path):
    make(tmp_path, {"x/a/0.tar": b"", "x/b/0.tar": b""})
    found = of_split(find(f"{tmp_path}/x/*/0.tar", ".tar"), f"{tmp_path}/x/*/0.tar", "train")
    assert [each.name for each in found] == ["a/0.tar", "b/0.tar"]
    one = of_split(find(f"{tmp_path}/x/a/0.tar", ".tar"), f"{tmp_path}/x/a/0.tar", "train")
    assert [each.name for each in one] == ["0.tar"]
