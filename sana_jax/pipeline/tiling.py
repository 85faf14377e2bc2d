"""Encodes and decodes large images one tile at a time, and large batches in groups.

Tiles start every `stride` pixels and are up to `tile` pixels large. Where two overlap, the later
one fades in linearly over `tile - stride` pixels: first from the tile above, then from the tile to
the left, both as they are after their own blending. Tiles and weights are those of diffusers'
AutoencoderDC; as there, the last tile can be a sliver that the tile before it covers already.

Attention and norms see one tile only, so the result is close to that of the whole image, not equal.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from sana_jax.runtime.errors import UserError

Size = int | tuple[int, int]  # pixels: both sides, or (height, width)

# Pixels above which pictures are decoded in tiles unless told otherwise, and their size and stride:
# the reference's recommendation for 4096 px. The seams of smaller tiles show in flat areas.
LARGE, LARGE_TILE = 2048 * 2048, (1024, 896)


def tiled_encode(
    encode: Callable[[Array], Array],
    images: Float[Array, "B H W 3"],
    tile: Size,
    stride: Size,
    factor: int,
) -> Float[Array, "B h w c"]:
    """Computes `encode(images)` by tiles; at once if the images are no larger than a tile.

    `encode` should be jitted: it meets only a few shapes. `factor` is the number of pixels along a
    side of one latent. Tiles that are no multiple of `factor` are padded with zeros, and a stride
    that is no multiple of it gives latents of another size than h, w, both as in diffusers. Raises
    ValueError if a side of the images is no multiple of `factor`, or a stride is not between
    `factor` and the tile.
    """
    tile, stride = check(tile, stride, factor)
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(f"images of {height} x {width} pixels: not multiples of {factor}")
    if height <= tile[0] and width <= tile[1]:
        return encode(images)

    def padded(pixels):
        below, right = -pixels.shape[1] % factor, -pixels.shape[2] % factor
        return jnp.pad(pixels, ((0, 0), (0, below), (0, right), (0, 0)))

    rows = ((encode(padded(t)) for t in row) for row in _cut(images, tile, stride))
    latents = _join(rows, _divide(tile, factor), _divide(stride, factor))
    return latents[:, : height // factor, : width // factor]


def tiled_decode(
    decode: Callable[[Array], Array],
    latents: Float[Array, "B h w c"],
    tile: Size,
    stride: Size,
    factor: int,
) -> Float[Array, "B H W 3"]:
    """Computes `decode(latents)` by tiles; at once if the latents are no larger than a tile.

    Tile and stride are in pixels, as in `tiled_encode`; a stride that is no multiple of `factor`
    gives images of another size than H, W.
    """
    tile, stride = check(tile, stride, factor)
    small = _divide(tile, factor)
    if latents.shape[1] <= small[0] and latents.shape[2] <= small[1]:
        return decode(latents)
    rows = ((decode(t) for t in row) for row in _cut(latents, small, _divide(stride, factor)))
    return _join(rows, tile, stride)


def decode_in_groups(
    decode: Callable[[Array], Array], latents: Float[Array, "B h w c"], devices: int, most: int
) -> Float[Array, "B H W 3"]:
    """Computes `decode(latents)` with at most `most` rows at a time on each of `devices`.

    It runs under jit. The batch is a multiple of the devices.
    """
    each = latents.shape[0] // devices
    groups = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= most)
    if groups == 1:
        return decode(latents)
    # A group has rows of every device.
    parts = rearrange(latents, "(d g n) h w c -> g (d n) h w c", d=devices, g=groups)
    return rearrange(lax.map(decode, parts), "g (d n) H W c -> (d g n) H W c", d=devices)


def check(tile: Size, stride: Size, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns tile and stride as (height, width) each. Raises UserError."""
    pairs = [(s, s) if isinstance(s, int) else s for s in (tile, stride)]
    for pair in pairs:
        if not isinstance(pair, tuple | list) or [type(side) for side in pair] != [int, int]:
            raise UserError(f"tile size or stride {pair!r} is neither pixels nor a pair of them")
    tile, stride = map(tuple, pairs)
    if not all(factor <= s <= t for s, t in zip(stride, tile, strict=True)):
        raise UserError(
            f"stride {stride} must lie between the factor {factor} and the tile {tile}, in pixels"
        )
    return (tile[0], tile[1]), (stride[0], stride[1])


def _divide(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return size[0] // factor, size[1] // factor


def _cut(x: Array, tile: tuple[int, int], stride: tuple[int, int]) -> Iterator[Iterator[Array]]:
    """Yields the tiles of x, row by row, each cut when it is needed."""
    for top in range(0, x.shape[1], stride[0]):
        rows = x[:, top : top + tile[0]]
        yield (rows[:, :, left : left + tile[1]] for left in range(0, x.shape[2], stride[1]))


def _join(rows: Iterable[Iterable[Array]], tile: tuple[int, int], stride: tuple[int, int]) -> Array:
    """Blends the tiles and joins them, keeping at most two rows of tiles in memory."""
    strips, above = [], []
    for row in rows:
        blended = []
        for j, current in enumerate(row):
            # A tile is waited for before the next one starts: its network needs most memory.
            jax.block_until_ready(current)
            if above:
                current = _blend(above[j], current, tile[0] - stride[0], axis=1)
            if blended:
                current = _blend(blended[-1], current, tile[1] - stride[1], axis=2)
            blended.append(current)
        cropped = [t[:, : stride[0], : stride[1]] for t in blended]
        strips.append(jnp.concatenate(cropped, axis=2))
        above = blended
    return jnp.concatenate(strips, axis=1)


@partial(jax.jit, static_argnames=("extent", "axis"))
def _blend(before: Array, current: Array, extent: int, axis: int) -> Array:
    """Fades the first `extent` rows (axis 1) or columns (2) of `current` in over `before`."""
    extent = min(before.shape[axis], current.shape[axis], extent)
    weight = jnp.arange(extent, dtype=jnp.float32) / extent
    weight = jnp.expand_dims(weight, [a for a in range(4) if a != axis])
    end = lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    start, rest = jnp.split(current, [extent], axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
