"""The task as evaluate calls it; what its figures are, tests/test_evaluate.py compares."""

import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.checkpoints import native
from sana_jax.metrics import reconstruction_task
from sana_jax.metrics.reconstruction_task import Options, open_data, reconstruction
from sana_jax.runtime.errors import UserError
from tests import mini

SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    mini.save(folder / "whole")
    native.save(mini.alone(folder / "whole"), folder / "alone")
    return str(folder / "alone")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(reconstruction_task, "SHAPES_TEST", 3)
    return tmp_path


def save_pictures(folder, colours):
    folder.mkdir(parents=True)
    for i, colour in enumerate(colours):
        Image.new("RGB", (SIZE, SIZE), colour).save(folder / f"{i}.png")


def test_shapes_is_drawn_into_a_cache_once(checkpoint, cache):
    options = Options(size=SIZE, batch_size=2)
    first = reconstruction(checkpoint, options)
    (drawn,) = cache.rglob("shapes-test*")
    written = drawn.stat().st_mtime_ns
    assert reconstruction(checkpoint, options) == first
    assert drawn.stat().st_mtime_ns == written
    found = first.figures
    assert (found["data"], found["split"], found["count"]) == ("shapes", "test", 3)
    assert first.sheet is None
    json.dumps(found, allow_nan=False)


def test_the_sheet_shows_the_first_usable_images_above_their_reconstructions(checkpoint, tmp_path):
    colours = [(200, 0, 0), (0, 0, 200)]
    save_pictures(tmp_path / "pictures", colours)
    (tmp_path / "pictures" / "00.png").write_text("<html>")
    options = Options(data=str(tmp_path / "pictures"), size=SIZE)
    found = reconstruction(checkpoint, options, draw_sheet=True)
    assert found.sheet.shape == (2 * SIZE + 2, 2 * SIZE + 2, 3)
    first, second = found.sheet[:, :SIZE], found.sheet[:, SIZE + 2 :]
    for column, colour in (first, colours[0]), (second, colours[1]):
        assert (column[:SIZE] == colour).all()
        assert (column[SIZE + 2 :] != colour).any()
    assert found.figures["rejected"] == {"not_an_image": 1}
    assert "2 images at 16 px; 3 read, 2 used, 1 not_an_image" in found.text


def test_the_split_is_test_where_there_is_one(tmp_path):
    save_pictures(tmp_path / "split" / "train", ["red"])
    save_pictures(tmp_path / "split" / "test", ["red", "blue"])
    save_pictures(tmp_path / "flat", ["red"] * 3)
    for data, split, wanted in ("split", None, ("test", 2)), ("split", "train", ("train", 1)):
        source, name = open_data(str(tmp_path / data), None, split, SIZE)
        assert (name, len(source)) == wanted
    source, name = open_data(str(tmp_path / "flat"), None, None, SIZE)
    assert (name, len(source)) == (None, 3)


def test_what_a_folder_holds_out_is_measured_whatever_it_is_called(tmp_path):
    save_pictures(tmp_path / "photos/train2017", ["red", "blue"])
    save_pictures(tmp_path / "photos/val2017", ["green"])
    source, name = open_data(str(tmp_path / "photos"), None, None, SIZE)
    assert (name, len(source)) == ("test", 1)


def test_a_cache_holds_no_other_split_of_shapes(cache):
    with pytest.raises(UserError, match="--split=train of shapes"):
        open_data("shapes", None, "train", SIZE)
    assert list(cache.iterdir()) == []


def test_lpips_needs_more_pixels_than_its_tower_pools_away(checkpoint, cache, monkeypatch):
    monkeypatch.setattr(
        reconstruction_task.lpips, "load", lambda tower, weights: {"heads": np.zeros(1)}
    )
    with pytest.raises(UserError, match="--size=31 or more"):
        reconstruction(checkpoint, Options(size=SIZE, lpips_weights="alex.pth"))
