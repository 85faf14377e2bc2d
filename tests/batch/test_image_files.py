"""Files of pictures as arrays: what is read, when, and what is told of files that change."""

import numpy as np
import pytest

from sana_jax.batch import image_files
from sana_jax.batch.image_files import ImageFile
from sana_jax.batch.inputs import with_inputs
from sana_jax.runtime.errors import UserError
from tests.batch.test_inputs import SIDE, half, picture, save, tasks_of


def test_a_file_is_an_array_that_is_read_when_it_is_needed(tmp_path, monkeypatch):
    image, mask = save(tmp_path / "a.png", picture()), save(tmp_path / "m.png", half())
    (task,) = with_inputs(tasks_of({"image": image, "mask": mask}))
    assert (task.height, task.width) == (SIDE, SIDE)
    assert task.inputs.image.shape == (SIDE, SIDE, 3) and task.inputs.mask.shape == (SIDE, SIDE)
    np.testing.assert_array_equal(np.asarray(task.inputs.image), picture())
    np.testing.assert_array_equal(np.stack([task.inputs.mask] * 2)[1], half())
    monkeypatch.setattr(image_files, "_content", None)
    np.testing.assert_array_equal(np.asarray(task.inputs.image), picture())  # kept


def test_a_file_that_changes_while_pictures_are_drawn_is_told(tmp_path):
    image = save(tmp_path / "a.png", picture())
    (task,) = with_inputs(tasks_of({"image": image}))
    save(tmp_path / "a.png", picture(1))
    image_files._pixels_of.cache_clear()
    with pytest.raises(UserError, match="a.png has changed since this command began"):
        np.asarray(task.inputs.image)


def test_a_mask_may_have_transparency_of_which_nothing_shows_through(tmp_path):
    image = save(tmp_path / "a.png", picture())
    mask = save(tmp_path / "m.png", np.dstack([half()] * 3 + [np.full_like(half(), 255)]))
    (task,) = with_inputs(tasks_of({"image": image, "mask": mask}))
    np.testing.assert_array_equal(np.asarray(task.inputs.mask), half())


def test_files_have_a_largest_size(tmp_path, monkeypatch):
    image = save(tmp_path / "a.png", picture())
    monkeypatch.setattr(image_files, "MAX_FILE", 99)
    with pytest.raises(UserError, match=r"^--image=.*a.png has \d+ bytes, 99 at most"):
        with_inputs(tasks_of({}, image=image))


def test_equal_files_have_equal_hashes(tmp_path):
    one, two = (save(tmp_path / name, picture()) for name in ("a.png", "b.png"))
    first, second = with_inputs(tasks_of({"image": one}, {"image": two}))
    assert first.inputs.image.sha256 == second.inputs.image.sha256
    assert isinstance(first.inputs.image, ImageFile) and first.inputs.image != second.inputs.image
