"""Samples the scenes of the built-in data set `shapes` from a seed.

A scene is one to four flat objects, no two alike, on a muted background. Its coordinates run from
0 to 1 (x to the right, y down, each along its side of the picture), and lengths are parts of the
shorter side, so a scene can be drawn at any size and shape. `truth` lists the facts that a caption
may state. Positions and relations have a name only if they are clear by a margin.

Some combinations of a shape and a colour (`HELD_OUT`) occur in no training scene; every test
scene has at least one of them.
"""

import dataclasses
import math

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart")

# sRGB, 0..1. The nearest two are 46 apart in CIELAB, and none is nearer than 50 to a grey.
COLOURS = {
    "red": (0.82, 0.10, 0.14),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.95, 0.87, 0.16),
    "green": (0.15, 0.62, 0.22),
    "cyan": (0.12, 0.80, 0.84),
    "blue": (0.10, 0.40, 0.92),
    "purple": (0.50, 0.11, 0.62),
    "pink": (0.99, 0.50, 0.76),
}

# Radius: at 128 px 15-17 and 23-25. A small one is as wide as a token of a 32x autoencoder.
SIZES = {"small": (0.12, 0.135), "large": (0.18, 0.195)}

TEXTURES = ("plain", "gradient", "stripes", "checks", "blobs")
CONTRAST = (0.03, 0.10)  # a texture's largest deviation from the background's colour, of 1

# A Latin square's diagonal: each shape and each colour once, so that training sees all of them.
HELD_OUT = frozenset(
    (shape, tuple(COLOURS)[(3 * i + 1) % len(COLOURS)]) for i, shape in enumerate(SHAPES)
)
COMBINATIONS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
MAX_OBJECTS = 4
SPLITS = ("train", "test")

_BORDER, _GAP = 0.02, 0.04  # least distance of an object from the border, and of two objects
_NEAR, _MIDDLE = 0.37, 0.08  # left: x below 0.37, right: above 0.63; centre: 0.42..0.58
_APART, _STEEP = 0.22, 1.5  # a relation: this far along its axis, and 1.5 times the other axis

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
POSITIONS = (
    "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right",
    "centre",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Object:
    """One object; `tint` is added to its colour, `shade` is its relative change over a radius."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    tint: tuple[float, float, float]
    shade: float


@dataclasses.dataclass(frozen=True)
class Background:
    """A colour, and a texture whose largest deviation from it is `contrast`.

    `waves` are (weight, cycles along x, cycles along y, phase in turns), or for a gradient the
    direction alone.
    """

    colour: tuple[float, float, float]
    texture: str
    contrast: float
    waves: tuple[tuple[float, float, float, float], ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a picture. `light` is the direction of the objects' shading in radians."""

    seed: tuple[int, ...]
    split: str
    objects: tuple[Object, ...]
    background: Background
    light: float


def scene(seed: int | tuple[int, ...], split: str = "train") -> Scene:
    """Returns the scene of a seed (non-negative integers), the same on every machine.

    Train and test scenes of a seed are unrelated.
    """
    seed = (seed,) if isinstance(seed, int) else tuple(seed)
    # The length, because NumPy pads seeds with zeros: (5,) and (5, 0) were one.
    rng = np.random.default_rng([SPLITS.index(split), len(seed), *seed])
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    kinds = _combinations(rng, count, split)
    sizes = [str(size) for size in rng.choice(list(SIZES), count)]
    radii = [float(rng.uniform(*SIZES[size])) for size in sizes]
    objects = tuple(
        Object(
            *kind,
            size,
            x,
            y,
            radius,
            tint=tuple(rng.uniform(-0.03, 0.03, 3).tolist()),
            shade=float(rng.uniform(0.04, 0.14)),
        )
        for kind, size, radius, (x, y) in zip(kinds, sizes, radii, _places(rng, radii), strict=True)
    )
    light = float(rng.uniform(0, 2 * math.pi))
    return Scene(seed, split, objects, _background(rng), light)


def _combinations(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str]]:
    """Draws different (shape, colour); in the test split at least one is held out."""
    held_out = [kind for kind in COMBINATIONS if kind in HELD_OUT]
    first = [held_out[rng.integers(len(held_out))]] if split == "test" else []
    others = [
        kind for kind in COMBINATIONS if kind not in first and (first or kind not in HELD_OUT)
    ]
    chosen = rng.choice(len(others), count - len(first), replace=False)
    kinds = first + [others[i] for i in chosen]
    return [kinds[i] for i in rng.permutation(count)]


def _places(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """Draws centres, uniform among those that keep the distances, by rejection."""
    radius = np.array(radii)
    reach = radius + _BORDER
    apart = radius[:, None] + radius[None] + _GAP - 1e9 * np.eye(len(radii))
    while True:
        centres = rng.uniform(reach, 1 - reach, (64, 2, len(radii)))
        steps = centres[..., :, None] - centres[..., None, :]
        fits = ((steps**2).sum(1) >= apart * np.abs(apart)).all((1, 2))
        if fits.any():
            return [tuple(centre) for centre in centres[fits.argmax()].T.tolist()]


def _background(rng: np.random.Generator) -> Background:
    level = rng.uniform(0.3, 0.85)
    hue = rng.uniform(0, 1) + np.arange(3) / 3
    colour = level + rng.uniform(0, 0.03) * np.cos(2 * math.pi * hue)
    texture = str(rng.choice(TEXTURES))
    contrast = 0.0 if texture == "plain" else float(rng.uniform(*CONTRAST))
    return Background(tuple(colour.tolist()), texture, contrast, _waves(rng, texture))


def _waves(rng: np.random.Generator, texture: str) -> tuple[tuple[float, float, float, float], ...]:
    """Draws waves broad enough for an autoencoder that keeps 512 numbers of 128 x 128 pixels."""
    phase, other = rng.uniform(0, 1, 2)
    angle = rng.uniform(0, 2 * math.pi)
    if texture == "plain":
        waves = []
    elif texture == "gradient":
        waves = [(1.0, math.cos(angle), math.sin(angle), 0.0)]
    elif texture == "stripes":
        cycles = rng.uniform(1.5, 3.5)
        waves = [(1.0, cycles * math.cos(angle), cycles * math.sin(angle), phase)]
    elif texture == "checks":
        waves = [(1.0, rng.uniform(1.5, 3), 0.0, phase), (1.0, 0.0, rng.uniform(1.5, 3), other)]
    else:
        waves = [(rng.uniform(0.5, 1), *rng.uniform(-1.6, 1.6, 2), phase + k / 3) for k in range(3)]
    return tuple(tuple(float(value) for value in wave) for wave in waves)


def position(x: float, y: float) -> str | None:
    """Names a place that is clear: the corner, else the side, else the centre; or None."""
    for name in ("top left", "top right", "bottom left", "bottom right", *POSITIONS[:4], "centre"):
        if is_at(name, x, y):
            return name
    return None


def is_at(name: str, x: float, y: float, slack: float = 0.0) -> bool:
    """Returns True if (x, y) is at the place; `left` ignores y. `slack` widens the places."""
    near = _NEAR + slack
    if name == "centre":
        return max(abs(x - 0.5), abs(y - 0.5)) < _MIDDLE + slack
    sides = {"left": x < near, "right": x > 1 - near, "top": y < near, "bottom": y > 1 - near}
    return all(sides[word] for word in name.split())


def relation(a: tuple[float, float], b: tuple[float, float]) -> str | None:
    """Names where a clearly is, seen from b: "left of", "right of", "above", "below"; or None."""
    return next((name for name in OPPOSITE if is_related(name, a, b)), None)


def is_related(
    name: str, a: tuple[float, float], b: tuple[float, float], slack: float = 0.0
) -> bool:
    """Returns True if a is `name` b; slack 1 asks for the direction, 0 for the full margin."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {
        "left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx),
    }[name]  # fmt: skip
    return along > (1 - slack) * _APART and along > (1 - slack) * _STEEP * abs(across)


def truth(scene: Scene) -> dict:
    """Returns the facts of a scene, for JSON: count, objects, relations, background.

    Objects have a `position` (None if no name is clear). A relation is [i, name, j]: object i is
    left of (right of, above, below) object j; both directions of a pair are listed.
    """
    centres = [(thing.x, thing.y) for thing in scene.objects]
    pairs = [(i, j) for i in range(len(centres)) for j in range(len(centres)) if i != j]
    names = [(i, relation(centres[i], centres[j]), j) for i, j in pairs]
    return {
        "seed": list(scene.seed),
        "split": scene.split,
        "count": len(scene.objects),
        "objects": [
            dataclasses.asdict(thing) | {"position": position(thing.x, thing.y)}
            for thing in scene.objects
        ],
        "relations": [list(named) for named in names if named[1]],
        "background": dataclasses.asdict(scene.background),
        "light": scene.light,
    }
