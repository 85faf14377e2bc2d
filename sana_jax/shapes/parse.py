"""Reads a picture of `shapes` back into its objects, by classical image processing alone.

It never sees the prompt, and works at one size: the shorter side is resized to SIDE pixels first.

Backgrounds are greys with one faint tint, whatever their texture. What a pixel's sRGB has beside
grey, less the background's, is therefore the object's own times its coverage: the soft mask of an
object, blurred if the picture is. Where it is over a half, connected pixels of one hue are an
object. Blur by a kernel of width sigma keeps a mask's sum and centre and adds sigma^2 to its
variance, so these three give, for every shape that it might be, the radius, the place and the blur
at once; the shape is the one whose mask, drawn like that, is nearest. The colour is that of full
coverage in the least-squares sense, hence right where blur has mixed it with the background.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy import ndimage

from sana_jax.shapes.draw import DISTANCES
from sana_jax.shapes.scene import COLOURS, SIZES

SIDE = 128  # pixels
COVERED = 0.45  # of its colour's chroma: where an object begins
SPECK = 40  # pixels that are no object: an eighth of the smallest, a star
PIECE, THICK = 90, 2.5  # least area, and half of the width, of one hue in a patch of several
POOR = 0.2  # misfit from which on a patch may be two objects of one hue that touch
MARGIN = 8  # pixels around an object that its blurred edge may reach
PEAKS = (1.0, 1.15)  # full coverage, in units of the highest seen: blur lowers that of small ones
BLURS = (0.4, 5.0)  # sigma in pixels
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # radius

Pixels = Float[np.ndarray, "h w 3"]
Chroma = Float[np.ndarray, "h w 2"]
Mask = Float[np.ndarray, "h w"]
Region = Bool[np.ndarray, "h w"]
Labels = Int[np.ndarray, "h w"]  # 0: background


@dataclasses.dataclass(frozen=True)
class Found:
    """An object that was found, in the units of scene.Object.

    `misfit` is the share of its mask's energy that its shape does not explain: 0 for an exact
    match.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    misfit: float = 0.0

    @property
    def size(self) -> str:
        return "large" if self.radius > LARGE else "small"


@dataclasses.dataclass(frozen=True)
class Palette:
    """The colours that objects may have: a unit vector of hue, the chroma, and CIELAB of each."""

    names: tuple[str, ...]
    hues: Float[np.ndarray, "n 2"]
    strengths: Float[np.ndarray, " n"]
    labs: Float[np.ndarray, "n 3"]


def parse(
    picture: UInt8[np.ndarray, "H W 3"], colours: Mapping[str, tuple[float, float, float]] = COLOURS
) -> list[Found]:
    """Returns the objects in a picture, the largest first.

    `colours`: the sRGB, 0..1, of all colours that an object may have.
    """
    palette = _palette(tuple(colours.items()))
    pixels = _resized(picture)
    chroma = pixels @ _OPPONENT
    chroma -= np.median(chroma, axis=(0, 1))
    labels = _label(chroma, palette)
    patches = (_objects(pixels, chroma, labels, k, palette) for k in range(1, 1 + labels.max()))
    return sorted(sum(patches, []), key=lambda thing: -thing.radius)


def _resized(picture: UInt8[np.ndarray, "H W 3"]) -> Pixels:
    """Resizes sRGB in 0..1 so that the shorter side has SIDE pixels."""
    height, width = picture.shape[:2]
    if min(height, width) != SIDE:
        scale = SIDE / min(height, width)
        size = round(width * scale), round(height * scale)
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    return picture.astype(np.float32) / 255


# From sRGB to the plane across the axis of greys, orthonormal.
_OPPONENT = np.float32([[2, 0], [-1, math.sqrt(3)], [-1, -math.sqrt(3)]]) / math.sqrt(6)


@functools.cache
def _palette(colours: tuple[tuple[str, tuple[float, float, float]], ...]) -> Palette:
    names, values = zip(*colours, strict=True)
    chromas = np.float32(values) @ _OPPONENT
    strengths = np.linalg.norm(chromas, axis=1)
    return Palette(names, chromas / strengths[:, None], strengths, _lab(np.array(values)))


def _label(chroma: Chroma, palette: Palette) -> Labels:
    """Numbers the patches of one hue; fringes of another hue join the patch beside them."""
    hue = (chroma @ palette.hues.T).argmax(-1)
    covered = np.linalg.norm(chroma, axis=-1) > COVERED * palette.strengths[hue]
    patches = []
    for k in np.unique(hue[covered]):
        parts, last = ndimage.label(covered & (hue == k))
        sizes = np.bincount(parts.ravel())
        depths = ndimage.maximum(ndimage.distance_transform_edt(parts), parts, range(1 + last))
        wanted = np.flatnonzero((sizes >= PIECE) & (np.array(depths) >= THICK))
        patches += [parts == part for part in wanted if part]
    # An island without any such patch is small, or of all hues.
    islands, last = ndimage.label(covered)
    sizes = np.bincount(islands.ravel())
    taken = {island for patch in patches for island in np.unique(islands[patch])}
    lost = [k for k in range(1, 1 + last) if k not in taken and sizes[k] >= SPECK]
    patches += [islands == k for k in lost]
    seeds = np.zeros(hue.shape, np.int32)
    for number, patch in enumerate(patches, 1):
        seeds[patch] = number
    return _grow(seeds, np.isin(islands, [*taken, *lost]))


def _grow(seeds: Labels, region: Region) -> Labels:
    """Gives every pixel of the region the label of the nearest seed."""
    rows, columns = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    return np.where(region, seeds[rows, columns], 0)


def _objects(
    pixels: Pixels, chroma: Chroma, labels: Labels, k: int, palette: Palette
) -> list[Found]:
    """Returns a patch's object, or its touching objects of one hue."""
    whole = _fit(pixels, chroma, labels, k, palette)
    if whole.misfit < POOR:
        return [whole]
    patch = labels == k
    depth = ndimage.distance_transform_edt(patch)
    for level in np.arange(THICK, depth.max()):
        cores, count = ndimage.label(depth > level)
        if count > 1:
            split = _grow(cores, patch)
            parts = [_fit(pixels, chroma, split, part, palette) for part in range(1, 1 + count)]
            better = max(part.misfit for part in parts) < whole.misfit / 2
            return parts if better else [whole]
    return [whole]


def _fit(pixels: Pixels, chroma: Chroma, labels: Labels, k: int, palette: Palette) -> Found:
    """Finds the shape and colour that explain a patch best."""
    box = tuple(
        slice(max(0, side.start - MARGIN), min(limit, side.stop + MARGIN))
        for side, limit in zip(ndimage.find_objects(labels)[k - 1], labels.shape, strict=True)
    )
    pixels, chroma, labels, (height, width) = pixels[box], chroma[box], labels[box], labels.shape
    near = _grow(labels, np.ones(labels.shape, bool)) == k
    direction = chroma[labels == k].mean(0)
    mask = chroma @ (direction / np.linalg.norm(direction))
    mask = np.where(near, mask / np.percentile(mask[labels == k], 97), 0)
    guesses = [(shape, *_match(mask / peak, shape)) for shape in DISTANCES for peak in PEAKS]
    shape, misfit, x, y, radius, drawn = min(guesses, key=lambda guess: guess[1])
    return Found(
        shape,
        _colour(pixels[near], drawn[near], palette),
        (box[1].start + x) / width,
        (box[0].start + y) / height,
        radius / min(height, width),
        misfit,
    )


def _match(mask: Mask, shape: str) -> tuple[float, float, float, float, Mask]:
    """Returns misfit, x, y, radius in pixels, and the mask of the shape with this mask's sums."""
    area, below, variance = _unit(shape)
    total, x, y, spread = _sums(mask)
    radius = math.sqrt(total / area)
    y -= below * radius
    blur = math.sqrt(max(0, spread - variance * radius**2))
    drawn = _draw(shape, x, y, radius, min(max(blur, BLURS[0]), BLURS[1]), mask.shape)
    amount = (drawn * mask).sum() / max((drawn**2).sum(), 1e-6)
    misfit = ((mask - amount * drawn) ** 2).sum() / (mask**2).sum()
    return float(misfit), x, y, radius, drawn


def _draw(shape: str, x: float, y: float, radius: float, blur: float, size) -> Mask:
    down, across = (
        (np.arange(side, dtype=np.float32) + np.float32(0.5 - centre)) / np.float32(radius)
        for side, centre in zip(size, (y, x), strict=True)
    )
    coverage = np.clip(0.5 - radius * DISTANCES[shape](across[None], down[:, None]), 0, 1)
    return ndimage.gaussian_filter(coverage, blur, mode="constant", truncate=3)


def _sums(mask: Mask) -> tuple[float, float, float, float]:
    """Returns sum, centre (x, y), and the mean of the variances along both axes."""
    down, across = (np.arange(side) + 0.5 for side in mask.shape)
    rows, columns = mask.sum(1), mask.sum(0)
    total = max(rows.sum(), 1e-6)
    x, y = columns @ across / total, rows @ down / total
    spread = (columns @ (across - x) ** 2 + rows @ (down - y) ** 2) / (2 * total)
    return float(total), float(x), float(y), float(spread)


@functools.cache
def _unit(shape: str) -> tuple[float, float, float]:
    """Returns, for a shape of radius 1: area, offset of its mass below the centre, variance."""
    scale = 200
    places = (np.arange(2.2 * scale) + 0.5) / scale - 1.1
    inside = DISTANCES[shape](places[None], places[:, None]) < 0
    total, _, y, spread = _sums(inside.astype(np.float64))
    return total / scale**2, y / scale - 1.1, spread / scale**2


def _colour(
    pixels: Float[np.ndarray, "n 3"], coverage: Float[np.ndarray, " n"], palette: Palette
) -> str:
    """Returns the nearest colour, in CIELAB, at full coverage."""
    design = np.stack([coverage, 1 - coverage], 1)
    colour, _ = np.linalg.lstsq(design, pixels, rcond=None)[0]
    distances = np.linalg.norm(_lab(colour.clip(0, 1)) - palette.labs, axis=-1)
    return palette.names[distances.argmin()]


def _lab(colour: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Converts sRGB in 0..1 to CIELAB, white D65 (IEC 61966-2-1; CIE 15)."""
    linear = np.where(colour > 0.04045, ((colour + 0.055) / 1.055) ** 2.4, colour / 12.92)
    xyz = linear @ _XYZ.T / _XYZ.sum(1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # fmt: skip
