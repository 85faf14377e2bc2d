"""Rows of pixels: their size and type, and what is refused."""

import numpy as np
import pytest

from sana_jax.data.transforms import BucketTransform, ImageTransform
from sana_jax.runtime.errors import UserError
from tests.data.bad_files import encode

RNG = np.random.default_rng(0)


def record(height=40, width=60):
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    return {"key": "a", "image": encode(pixels, "PNG"), "captions": []}


def test_an_image_has_the_size_that_was_asked_for_in_whole_numbers():
    found = ImageTransform(32, 48)(record(), RNG)["image"]
    assert found.shape == (32, 48, 3) and found.dtype == np.uint8


def test_runs_that_began_when_rows_were_floats_go_on():
    one, several = ImageTransform(32, 48), BucketTransform(((32, 32), (32, 48)))
    assert one.settings["dtype"] == several.settings["dtype"] == "float32"


def test_the_nearest_bucket_is_taken():
    transform = BucketTransform(((32, 32), (32, 48)))
    assert transform(record(40, 60), RNG)["image"].shape == (32, 48, 3)
    assert transform(record(40, 42), RNG)["image"].shape == (32, 32, 3)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ImageTransform(8, 8, crop="left"), "crop='left'"),
        (lambda: ImageTransform(8, 8, flip=True), "flip=True"),
        (lambda: BucketTransform(((8, 8),), crop="patch"), "crop='patch'"),
    ],
)
def test_options_that_mean_nothing_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()
