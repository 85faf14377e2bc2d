"""open_source: what a name may mean."""

import os

import pytest
from etils import epath

from sana_jax.data.images import decode
from sana_jax.data.records import Record
from sana_jax.data.sources import check_apart, open_source
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.shapes.dataset import prepare
from tests.data.test_folder import PNG, make


def test_a_folder_is_the_split_train(tmp_path):
    source = open_source(str(make(tmp_path, {"a.png": PNG, "b/c.png": PNG})))
    assert [source[i]["key"] for i in range(len(source))] == ["a.png", "b/c.png"]


def test_an_archive_without_its_kind_is_refused_with_it(tmp_path):
    for name, kind in ("a.tar", "webdataset"), ("a.parquet", "parquet"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"archive: write {kind}:{tmp_path / name}"):
            open_source(str(tmp_path / name))


def test_subfolders_may_be_splits(tmp_path):
    make(tmp_path, {"train/a.png": PNG, "test/b.png": PNG, "test/c.png": PNG})
    assert len(open_source(str(tmp_path))) == 1
    assert len(open_source(str(tmp_path), "test")) == 2
    with pytest.raises(UserError, match="no split 'val', .* there are test, train"):
        open_source(str(tmp_path), "val")


def test_a_test_split_is_not_trained_on(tmp_path):
    make(tmp_path, {"a.png": PNG, "test/b.png": PNG})
    with pytest.raises(UserError, match="no split 'train'"):
        open_source(str(tmp_path))


def test_what_a_name_calls_held_out_is_not_trained_on(tmp_path):
    make(tmp_path, {"train2017/a.png": PNG, "val2017/b.png": PNG})
    train, test = (open_source(str(tmp_path), split) for split in ("train", "test"))
    assert [train[0]["key"], test[0]["key"]] == ["a.png", "b.png"] and len(train) == len(test) == 1
    moved = make(tmp_path / "moved", {"train2017/a.png": PNG})
    assert open_source(str(moved)).fingerprint == train.fingerprint
    assert open_source(str(moved / "train2017")).fingerprint == train.fingerprint


@pytest.mark.parametrize("kind", ["link", "hard link", "folder", "none"])
def test_links_to_pictures_that_are_trained_on_are_not_held_out(tmp_path, kind):
    root = make(tmp_path, {"train/a.png": PNG, "train/b.png": PNG, "other/test/c.png": PNG})
    if kind == "folder":
        (root / "test").symlink_to(root / "train")
    else:
        (root / "test").mkdir()
        link = os.link if kind == "hard link" else os.symlink
        link(root / ("other/test/c.png" if kind == "none" else "train/b.png"), root / "test/b.png")
    sources = [open_source(str(root), split) for split in ("train", "test")]
    if kind == "none":
        check_apart(*sources, "train", "test")
        return
    common = 2 if kind == "folder" else 1
    with pytest.raises(UserError, match=f"test_split=test have {common} records in common"):
        check_apart(*sources, "train", "test")


@pytest.mark.parametrize("there", [None, {}, {"test/a.png": PNG}, {"notes.txt": "a"}])
@pytest.mark.parametrize("kind", ["", "precomputed:", "tfds:sana_toy_that_moved:"])
def test_data_that_was_read_before_is_away_and_not_wrong(tmp_path, there, kind):
    """A mount point is there, empty, while its disk is not."""
    root = tmp_path / "photos"
    if there is not None:
        root.mkdir()
        make(root, there)
    spec = f"{kind}{root}" if kind != "tfds:sana_toy_that_moved:" else "tfds:sana_toy_that_moved"
    with pytest.raises(UserError):
        open_source(spec, data_dir=str(root))
    with pytest.raises(Retry, match="it was there before; try again when it is back"):
        open_source(spec, data_dir=str(root), resumes=True)


def test_a_folder_that_does_not_answer(tmp_path, monkeypatch):
    def broken(path):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "iterdir", broken)
    with pytest.raises(UserError, match=f"{tmp_path}: Transport endpoint is not connected"):
        open_source(str(tmp_path))
    with pytest.raises(Retry, match="Transport endpoint"):
        open_source(str(tmp_path), resumes=True)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="missing: there is no such folder; the data is shapes"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="a.png: there is no such folder"):
        open_source(str(make(tmp_path, {"a.png": PNG}) / "a.png"))


def test_shapes_is_read_from_where_it_was_prepared(tmp_path):
    with pytest.raises(UserError, match="is not there; make it with python -m"):
        open_source("shapes", "train", str(tmp_path), size=32)
    prepare(tmp_path, size=32, train=6, test=3)
    train, test = (open_source("shapes", split, str(tmp_path), 32) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 3) and train.fingerprint != test.fingerprint
    assert set(train[0]) == Record.__required_keys__ | {"image"}
    assert decode(train[0]["image"]).shape == (32, 32, 3)
    again = open_source("shapes", "train", str(tmp_path), 32)
    assert again.fingerprint == train.fingerprint
