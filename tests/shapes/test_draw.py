"""Pictures against Pillow's polygons, against their own scenes, and across sizes."""

import colorsys
import dataclasses
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sana_jax.shapes.draw import draw
from sana_jax.shapes.scene import COLOURS, SHAPES, TEXTURES, Background, Object, Scene, scene

GREY = Background((128 / 255,) * 3, "plain", 0.0, ())
FINE = 16  # samples of the reference along a pixel's side


def one(shape, x=0.5, y=0.5, radius=0.3, colour="yellow"):
    thing = Object(shape, colour, "large", x, y, radius, (0, 0, 0), 0.0)
    return Scene((0,), "train", (thing,), GREY, 0.0)


def coverage(drawn, height, width):
    """0..1, from the blue channel, where grey and yellow differ most."""
    blue = draw(drawn, height, width)[..., 2] / 255
    return (128 / 255 - blue) / (128 / 255 - COLOURS["yellow"][2])


def circle_points(x, y, radius, start=0.0, stop=2 * math.pi):
    angles = np.linspace(start, stop, 721)
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in angles]


def outline(shape):
    """(corners of what is filled, corners of what is cut out), for a radius of 1."""
    tip, arm, side, lobe = math.pi / 5, 0.32, math.sqrt(3) / 2, 0.83 / 2
    polygons = {
        "circle": [circle_points(0, 0, 1)],
        "ring": [circle_points(0, 0, 1)],
        "square": [[(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]],
        "triangle": [[(0, -0.87), (1.74 / side / 2, 0.87), (-1.74 / side / 2, 0.87)]],
        "diamond": [[(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]],
        "star": [
            [(r * math.sin(k * tip), -r * math.cos(k * tip)) for k, r in enumerate([1, 0.47] * 5)]
        ],
        "cross": [
            [(-1, -arm), (1, -arm), (1, arm), (-1, arm)],
            [(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)],
        ],
        "heart": [
            [(0, 0.06 - 0.83), (0.83, 0.06), (0, 0.06 + 0.83), (-0.83, 0.06)],
            circle_points(lobe, 0.06 - lobe, lobe * math.sqrt(2)),
            circle_points(-lobe, 0.06 - lobe, lobe * math.sqrt(2)),
        ],
    }
    return polygons[shape], [circle_points(0, 0, 0.48)] if shape == "ring" else []


def reference(shape, x, y, radius, height, width):
    """Coverage by counting samples of Pillow's polygons; x, y and radius in pixels."""
    canvas = Image.new("L", (width * FINE, height * FINE))
    for value, polygons in zip((255, 0), outline(shape), strict=True):
        for points in polygons:
            scaled = [
                (FINE * (x + radius * u) - 0.5, FINE * (y + radius * v) - 0.5) for u, v in points
            ]
            ImageDraw.Draw(canvas).polygon(scaled, fill=value)
    samples = np.asarray(canvas, np.float64).reshape(height, FINE, width, FINE) / 255
    return samples.mean((1, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius, x, y", [(40.3, 63.7, 62.2), (13.1, 64.4, 65.9)])
def test_shapes_are_what_they_are_called(shape, radius, x, y):
    ours = coverage(one(shape, x / 128, y / 128, radius / 128), 128, 128)
    theirs = reference(shape, x, y, radius, 128, 128)
    print(
        f"{shape}: largest {np.abs(ours - theirs).max():.3f}, area {ours.sum() / theirs.sum():.4f}"
    )
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.015)
    # A distance is not the covered area at corners and on slopes: up to a part of a pixel there.
    assert np.abs(ours - theirs).max() < 0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_one_pixel_soft(shape):
    """Moved by a tenth of a pixel, the picture changes by about a tenth at the edges."""
    pictures = [coverage(one(shape, 0.5 + step / 1280), 128, 128) for step in range(11)]
    steps = [np.abs(b - a).max() for a, b in zip(pictures, pictures[1:], strict=False)]
    assert 0.01 < min(steps) and max(steps) < 0.2
    np.testing.assert_allclose(pictures[10][:, 1:], pictures[0][:, :-1], atol=0.02)


@pytest.mark.parametrize("height, width", [(256, 256), (64, 64), (96, 160), (200, 72)])
def test_a_scene_is_the_same_at_any_size(height, width):
    for index in range(40):
        drawn = scene((1, index))
        large = draw(drawn, 4 * height, 4 * width) / 255
        small = large.reshape(height, 4, width, 4, 3).mean((1, 3))
        error = draw(drawn, height, width) / 255 - small
        assert 10 * math.log10(1 / np.mean(error**2)) > 34


def test_objects_are_where_the_truth_says():
    """From the pixels of strong colour alone."""
    for index in range(200):
        drawn = scene((2, index))
        if len(drawn.objects) > 1:
            continue
        (thing,) = drawn.objects
        pixels = draw(drawn, 128, 128).astype(int)
        rows, columns = np.nonzero(pixels.max(-1) - pixels.min(-1) > 70)
        x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
        assert x == pytest.approx(128 * thing.x, abs=1)
        # Star and heart do not fill their circle: their boxes' centres lie off theirs.
        assert y == pytest.approx(128 * thing.y, abs=1 + 0.1 * 128 * thing.radius)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert extent / 2 == pytest.approx(128 * thing.radius, rel=0.17)


def test_colours_are_told_by_their_hue_whatever_the_shading():
    hues = {name: colorsys.rgb_to_hsv(*colour)[0] for name, colour in COLOURS.items()}
    gaps = np.diff(sorted(hues.values()), append=min(hues.values()) + 1)
    assert gaps.min() > 0.05
    for index in range(200):
        drawn = scene((3, index), "test")
        pixels = draw(drawn, 128, 128) / 255
        for thing in drawn.objects:
            column, row = int(128 * thing.x), int(128 * thing.y)
            if thing.shape == "ring":
                row = int(128 * (thing.y - 0.74 * thing.radius))
            red, green, blue = pixels[row, column]
            hue = colorsys.rgb_to_hsv(red, green, blue)[0]
            turn = {name: abs((hue - h + 0.5) % 1 - 0.5) for name, h in hues.items()}
            assert min(turn, key=turn.get) == thing.colour


def test_backgrounds_have_the_stated_contrast_and_little_colour():
    found = set()
    for index in range(200):
        drawn = scene((4, index))
        background = drawn.background
        pixels = draw(dataclasses.replace(drawn, objects=()), 96, 128) / 255
        assert (pixels.max(-1) - pixels.min(-1)).max() < 0.07
        deviation = np.abs(pixels - background.colour).max()
        assert deviation == pytest.approx(background.contrast, abs=0.6 / 255)
        # Smooth: no step between neighbours is a quarter of the texture's range.
        steps = max(np.abs(np.diff(pixels, axis=axis)).max() for axis in (0, 1))
        assert steps <= 0.5 * background.contrast + 1.1 / 255
        found.add(background.texture)
    assert found == set(TEXTURES)
