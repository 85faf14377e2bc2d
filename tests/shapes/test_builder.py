"""Records of the data set; test_dataset.py writes and reads them."""

import io
import json

import numpy as np
from PIL import Image

from sana_jax.shapes.builder import record
from sana_jax.shapes.captions import CAPTIONERS
from sana_jax.shapes.draw import draw
from sana_jax.shapes.scene import scene, truth


def test_a_record_is_its_scene_drawn_and_captioned():
    found = record((3, 5), "test", 32, 48)
    made = scene((3, 5), "test")
    assert found["key"] == "test-3-5"
    pixels = np.asarray(Image.open(io.BytesIO(found["image"])))
    np.testing.assert_array_equal(pixels, draw(made, 32, 48))
    about = json.loads(found["truth"])
    said = about.pop("captions")
    assert about == json.loads(json.dumps(truth(made)))
    assert len(found["captions"]) == len(found["scores"]) == len(said) == len(CAPTIONERS)


def test_a_record_depends_on_its_number_and_split_alone():
    assert record((0, 1), "train", 32, 32) == record((0, 1), "train", 32, 32)
    assert record((0, 1), "train", 32, 32)["image"] != record((0, 2), "train", 32, 32)["image"]
