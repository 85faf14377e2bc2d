"""Pictures whose content is known, sharp, blurred, at other sizes, and with objects that touch."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage
from skimage.color import rgb2lab

from sana_jax.shapes.draw import draw
from sana_jax.shapes.parse import _lab, parse
from sana_jax.shapes.scene import COLOURS, SHAPES, Object, scene

SCENES = [scene((7, i), "test") for i in range(40)]


def blurred(picture, sigma):
    smooth = ndimage.gaussian_filter(picture.astype(np.float64), (sigma, sigma, 0))
    return np.floor(smooth + 0.5).astype(np.uint8)


def assert_found(picture, drawn, tolerance):
    things = parse(picture)
    found = {(each.shape, each.colour, each.size): each for each in things}
    assert set(found) == {(each.shape, each.colour, each.size) for each in drawn.objects}
    assert len(things) == len(drawn.objects)
    for thing in drawn.objects:
        seen = found[thing.shape, thing.colour, thing.size]
        assert (seen.x, seen.y) == pytest.approx((thing.x, thing.y), abs=tolerance)
        assert seen.radius == pytest.approx(thing.radius, rel=0.12)


@pytest.mark.parametrize("sigma", [0, 1, 2, 3])
def test_finds_everything(sigma):
    for drawn in SCENES:
        assert_found(blurred(draw(drawn, 128, 128), sigma), drawn, tolerance=0.02)


@pytest.mark.parametrize("size", [(64, 64), (192, 192), (128, 160)])
def test_at_other_sizes(size):
    for drawn in SCENES[:20]:
        assert_found(draw(drawn, *size), drawn, tolerance=0.02)


def test_noise_makes_no_objects():
    rng = np.random.default_rng(0)
    for drawn in SCENES[:20]:
        picture = draw(drawn, 128, 128) + rng.normal(0, 8, (128, 128, 3))
        assert_found(picture.clip(0, 255).astype(np.uint8), drawn, tolerance=0.02)


def touching(shapes, colours):
    """A small and a large object that overlap a little."""
    things = [
        Object(shape, colour, size, x, 0.5, radius, (0.0, 0.0, 0.0), 0.1)
        for shape, colour, size, x, radius in zip(
            shapes, colours, ("small", "large"), (0.33, 0.62), (0.125, 0.185), strict=True
        )
    ]
    return dataclasses.replace(SCENES[0], objects=tuple(things))


@pytest.mark.parametrize(
    ("shapes", "colours"),
    [
        (("circle", "cross"), ("red", "blue")),
        (("heart", "ring"), ("cyan", "yellow")),
        (("ring", "star"), ("purple", "pink")),
        # Of one colour they can be told apart only where the place of contact is narrow.
        (("circle", "cross"), ("green", "green")),
        (("ring", "star"), ("green", "green")),
    ],
)
def test_objects_that_touch(shapes, colours):
    drawn = touching(shapes, colours)
    found = {(each.shape, each.colour) for each in parse(draw(drawn, 128, 128))}
    assert found == set(zip(shapes, colours, strict=True))


@pytest.mark.parametrize("value", [0, 128, 255])
def test_nothing(value):
    assert parse(np.full((128, 128, 3), value, np.uint8)) == []


def test_anything_is_parsed():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 128, 128, 3)).astype(np.uint8)
    smooth = [blurred(picture, 8) for picture in pictures]
    stretched = [
        (4.0 * (picture - 128.0) + 128).clip(0, 255).astype(np.uint8) for picture in smooth
    ]
    for picture in (*pictures, *smooth, *stretched):
        for thing in parse(picture):
            assert thing.shape in SHAPES and thing.colour in COLOURS
            assert math.isfinite(thing.x + thing.y + thing.radius + thing.misfit)


def test_lab_is_that_of_scikit_image():
    colours = np.random.default_rng(0).uniform(0, 1, (50, 3))
    # The matrix here has four digits.
    np.testing.assert_allclose(_lab(colours), rgb2lab(colours), atol=0.05)
