"""Tiles and their blending against diffusers' AutoencoderDC."""

import gc

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import AutoencoderDC

from sana_jax.checkpoints.diffusers_configs import config_json
from sana_jax.pipeline.tiling import tiled_decode, tiled_encode
from tests import toy
from tests.models.test_dc_ae import SMALL, build, pair, random_array, theirs


def set_tiling(vae, tile, stride):
    vae.enable_tiling(tile[0], tile[1], stride[0], stride[1])
    return vae


# Slivers at the right and at the bottom.
@pytest.mark.parametrize(
    "size, tile, stride",
    [((40, 56), 24, 16), ((36, 32), (16, 28), (12, 20))],
    ids=["square", "not"],
)
def test_tiles_of_diffusers(size, tile, stride):
    _, (encode, decode) = pair(SMALL)
    pairs = [s if isinstance(s, tuple) else (s, s) for s in (tile, stride)]
    vae = set_tiling(build(SMALL), *pairs)
    images = random_array(1, *size, 3)
    latents = theirs(vae.encode, images)
    toy.assert_close(tiled_encode(encode, images, tile, stride, 4), latents, 1e-5, "encode")
    ours = tiled_decode(decode, latents, tile, stride, 4)
    toy.assert_close(ours, theirs(vae.decode, latents), 1e-5, "decode")
    # A test of the blending only if tiles matter.
    assert toy.relative_error(ours, decode(latents)) > 1e-3


class Ramp(torch.nn.Module):
    """Stands for a network: what it makes of a pixel depends on the place within the tile."""

    def __init__(self, up):
        super().__init__()
        self.up = up
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        resize = torch.nn.functional.interpolate
        x = resize(x, scale_factor=4) if self.up else torch.nn.functional.avg_pool2d(x, 4)
        down, right = torch.arange(x.shape[2]), torch.arange(x.shape[3])
        return x * (1 + down[:, None] + 0.1 * right)

    def on_array(self, x):
        return jnp.asarray(theirs(self.as_method, x))

    def as_method(self, x):
        return (self(x),)


@pytest.mark.parametrize(
    "tile, stride",
    [
        ((24, 24), (24, 24)),  # no overlap
        ((24, 16), (8, 8)),  # overlaps wider than a stride
        ((48, 12), (40, 8)),  # one row of tiles
        ((22, 25), (13, 19)),  # no multiples of the factor: padded tiles, another size
        ((4, 60), (4, 60)),
    ],
)
def test_any_tile_and_stride(tile, stride):
    vae = set_tiling(AutoencoderDC.from_config(config_json(SMALL)), tile, stride)
    vae.encoder, vae.decoder = Ramp(up=False), Ramp(up=True)
    for name, x in (("encode", random_array(2, 32, 36, 3)), ("decode", random_array(2, 8, 9, 3))):
        tiled = tiled_encode if name == "encode" else tiled_decode
        ours = tiled(getattr(vae, f"{name}r").on_array, x, tile, stride, 4)
        toy.assert_close(ours, theirs(getattr(vae, name), x), 1e-6, name)


def test_an_image_of_one_tile_is_not_tiled():
    images, latents = random_array(1, 24, 24, 3), random_array(1, 6, 6, 16)
    once = jnp.zeros((1, 1, 1, 3))
    assert tiled_encode(lambda x: once, images, 24, 16, 4) is once
    assert tiled_decode(lambda x: once, latents, (24, 27), 16, 4) is once


@pytest.mark.parametrize(
    "size, tile, stride, word",
    [
        ((42, 40), 24, 16, "42 x 40"),
        ((40, 40), 24, 3, "stride"),
        ((40, 40), 16, 24, "stride"),
        ((40, 40), (24, 16), (16, 20), "stride"),
        ((40, 40), 24, 0, "stride"),
    ],
)
def test_tilings_that_cannot_be(size, tile, stride, word):
    with pytest.raises(ValueError, match=word):
        tiled_encode(None, random_array(1, *size, 3), tile, stride, 4)
    if word == "stride":
        with pytest.raises(ValueError, match=word):
            tiled_decode(None, random_array(1, 10, 10, 16), tile, stride, 4)


def test_few_tiles_are_kept():
    """The row above and the row at hand, however many there are."""
    gc.collect()  # what other tests left
    alive = []

    def decode(latents):
        images = jnp.repeat(jnp.repeat(latents, 4, axis=1), 4, axis=2)
        alive.append(sum(array.shape == (1, 12, 12, 3) for array in jax.live_arrays()))
        return images

    tiled_decode(decode, random_array(1, 30, 10, 3), 12, 8, 4)
    assert len(alive) == 15 * 5
    assert 5 < max(alive) <= 2 * 5 + 1
