"""Draws the scenes of `shapes` in NumPy, at any size, with edges one pixel soft.

A shape is a signed distance in units of its radius, negative inside, y down; the largest extent
from its centre is about 1. A pixel's coverage is the distance of its centre from the edge, as far
as half a pixel on both sides. Only an object's bounding box is touched.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from sana_jax.shapes.scene import COLOURS, Background, Object, Scene

Distance = Float[np.ndarray, "h w"]


def draw(
    scene: Scene,
    height: int,
    width: int,
    colours: Mapping[str, tuple[float, float, float]] = COLOURS,
) -> UInt8[np.ndarray, "height width 3"]:
    """Draws a scene, in sRGB. `colours`: the sRGB, 0..1, of each name of a colour."""
    pixels = _background(scene.background, height, width)
    for thing in scene.objects:
        _paint(pixels, thing, colours[thing.colour], scene.light)
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)


def _paint(
    pixels: Float[np.ndarray, "H W 3"],
    thing: Object,
    colour: tuple[float, float, float],
    light: float,
) -> None:
    height, width = pixels.shape[:2]
    radius = thing.radius * min(height, width)  # pixels
    rows, y = _span(thing.y * height, radius, height)
    columns, x = _span(thing.x * width, radius, width)
    x, y = x[None, :], y[:, None]
    coverage = np.clip(0.5 - radius * DISTANCES[thing.shape](x, y), 0, 1)[..., None]
    ramp = 1 + thing.shade * (math.cos(light) * x + math.sin(light) * y)[..., None]
    shaded = (np.float32(colour) + np.float32(thing.tint)) * ramp
    pixels[rows, columns] += coverage * (shaded - pixels[rows, columns])


def _span(centre: float, radius: float, limit: int) -> tuple[slice, Float[np.ndarray, " n"]]:
    """Returns the pixels that an object may touch, and their centres in units of its radius."""
    start = max(0, math.floor(centre - 1.1 * radius - 1))
    stop = min(limit, math.ceil(centre + 1.1 * radius + 1))
    places = np.arange(start, stop, dtype=np.float32) + np.float32(0.5 - centre)
    return slice(start, stop), places / np.float32(radius)


def _background(background: Background, height: int, width: int) -> Float[np.ndarray, "H W 3"]:
    x = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :]
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    pixels = np.broadcast_to(np.float32(background.colour), (height, width, 3))
    if background.texture == "plain":
        return pixels.copy()
    pattern = _TEXTURES[background.texture](background.waves, x, y)
    return pixels + (background.contrast / np.abs(pattern).max() * pattern)[..., None]


def _turns(wave, x, y) -> Float[np.ndarray, "h w"]:
    _, along_x, along_y, phase = wave
    return np.sin(2 * math.pi * (along_x * x + along_y * y + phase))


def _gradient(waves, x, y):
    _, along_x, along_y, _ = waves[0]
    return along_x * (x - 0.5) + along_y * (y - 0.5)


def _stripes(waves, x, y):
    return np.tanh(2 * _turns(waves[0], x, y))


def _checks(waves, x, y):
    return np.tanh(2 * _turns(waves[0], x, y) * _turns(waves[1], x, y))


def _blobs(waves, x, y):
    return sum(wave[0] * _turns(wave, x, y) for wave in waves)


_TEXTURES = {"gradient": _gradient, "stripes": _stripes, "checks": _checks, "blobs": _blobs}


def _circle(x, y) -> Distance:
    return np.hypot(x, y) - 1


def _square(x, y) -> Distance:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86


def _triangle(x, y) -> Distance:
    """An equilateral triangle, one corner up, centred by its bounding box."""
    half = math.sqrt(3) / 2
    return np.maximum(half * np.abs(x) - 0.5 * (y + 0.87), y - 0.87)


def _diamond(x, y) -> Distance:
    return (np.abs(x) / 0.8 + np.abs(y) - 1) / math.hypot(1 / 0.8, 1)


def _star(x, y) -> Distance:
    """A star of five points, one up: the plane is folded into half a point, with one edge."""
    fold, inner = 2 * math.pi / 5, 0.47
    angle = np.arctan2(x, -y)  # from the upward axis
    angle = np.abs((angle + fold / 2) % fold - fold / 2)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    # From the tip (1, 0) to the notch between two points.
    edge = (inner * math.cos(fold / 2) - 1, inner * math.sin(fold / 2))
    return ((along - 1) * edge[1] - across * edge[0]) / math.hypot(*edge)


def _ring(x, y) -> Distance:
    return np.abs(np.hypot(x, y) - 0.74) - 0.26


def _cross(x, y) -> Distance:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.32)


def _heart(x, y) -> Distance:
    """A square on its corner with a half circle on each upper side."""
    corner = 0.83
    x, y = np.abs(x), y - 0.06
    lobe = np.hypot(x - corner / 2, y + corner / 2) - corner / math.sqrt(2)
    return np.minimum(lobe, (x + np.abs(y) - corner) / math.sqrt(2))


DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}
