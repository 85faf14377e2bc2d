"""open_source: what a name may mean."""

import pytest

from sana_jax.data.images import decode
from sana_jax.data.records import Record
from sana_jax.data.sources import open_source
from sana_jax.runtime.errors import UserError
from sana_jax.shapes.dataset import prepare
from tests.data.test_folder import PNG, make


def test_a_folder_is_the_split_train(tmp_path):
    source = open_source(str(make(tmp_path, {"a.png": PNG, "b/c.png": PNG})))
    assert [source[i]["key"] for i in range(len(source))] == ["a.png", "b/c.png"]


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
