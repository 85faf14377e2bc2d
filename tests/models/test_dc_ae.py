"""DC-AE against diffusers' AutoencoderDC, with every weight random and the same on both sides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints.diffusers_configs import config_json
from sana_jax.models.dc_ae import DCAE, BatchNorm
from sana_jax.models.dc_ae_config import PRESETS, DCAEConfig
from sana_jax.models.tiling import tiled_decode, tiled_encode
from sana_jax.sharding import make_mesh, shardings_for
from tests import toy

# Parameters of encoder and decoder; the running statistics of batch norm are not counted.
ENCODER_SANA = 153_027_104
COUNTS = {
    "dc-ae-f32c32-sana-1.0": (ENCODER_SANA, 159_223_171),
    "dc-ae-f32c32-sana-1.1": (ENCODER_SANA, 159_223_171),
    "dc-ae-lite-f32c32-sana-1.1": (ENCODER_SANA, 268_154_124),
    "dc-ae-f32c32-in-1.0": (123_172_384, 200_184_076),
    "dc-ae-f32c32-mix-1.0": (123_172_384, 200_184_076),
    "dc-ae-f64c128-in-1.0": (264_550_528, 412_345_612),
    "dc-ae-f64c128-mix-1.0": (264_550_528, 412_345_612),
    "dc-ae-f128c512-in-1.0": (415_661_056, 705_021_196),
    "dc-ae-f128c512-mix-1.0": (415_661_056, 705_021_196),
}

_replace = dataclasses.replace
WIDTHS = (8, 16, 32, 32, 64, 64)
SANA = DCAEConfig(
    encoder_channels=WIDTHS,
    decoder_channels=WIDTHS,
    encoder_layers=(1, 1, 2, 2, 1, 1),
    decoder_layers=(1, 2, 1, 1, 1, 2),
)
LITE = _replace(
    PRESETS["dc-ae-lite-f32c32-sana-1.1"],
    encoder_channels=WIDTHS,
    decoder_channels=WIDTHS,
    encoder_layers=(1, 1, 1, 1, 1, 1),
    decoder_layers=(0, 1, 2, 1, 1, 1),
)
IN = _replace(
    PRESETS["dc-ae-f32c32-in-1.0"],
    encoder_channels=WIDTHS,
    decoder_channels=WIDTHS,
    encoder_layers=(0, 1, 2, 1, 1, 1),
    decoder_layers=(0, 1, 2, 1, 1, 1),
)
F64 = _replace(
    PRESETS["dc-ae-f64c128-in-1.0"],
    encoder_channels=(*WIDTHS, 128),
    decoder_channels=(*WIDTHS, 128),
    encoder_layers=(0, 1, 1, 1, 1, 1, 1),
    decoder_layers=(0, 1, 1, 1, 1, 1, 1),
)
# No release: what those have not, in a network that compiles fast.
SMALL = DCAEConfig(
    latent_channels=16,
    encoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_channels=(8, 16, 32),
    decoder_channels=(8, 16, 64),
    encoder_layers=(0, 1, 1),
    decoder_layers=(0, 1, 1),
    encoder_qkv_multiscales=((), (), (3, 5)),
    decoder_qkv_multiscales=((), (), ()),
    decoder_norms=("rms_norm", "batch_norm", "rms_norm"),
    decoder_activations=("silu",) * 3,
    encoder_out_shortcut=False,
    decoder_in_shortcut=False,
    scaling_factor=1.0,
)


def build(config, seed=0):
    """diffusers' network of `config` with random weights."""
    return toy.randomise(AutoencoderDC.from_config(config_json(config)), seed)


@functools.cache
def jitted(config, dtype=jnp.float32):
    """encode(params, images) and decode(params, latents)."""
    model = DCAE(config, dtype=dtype)

    def method(name):
        return jax.jit(lambda params, x: model.apply({"params": params}, x, method=name))

    return method("encode"), method("decode")


@functools.cache
def pair(config):
    """diffusers' network and our (encode, decode) with its weights."""
    vae = build(config)
    params = toy.params(vae, config)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        np.shape, nn.unbox(abstract_params(config))
    )
    return vae, tuple(functools.partial(f, params) for f in jitted(config))


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@torch.no_grad()
def theirs(method, x):
    """A method of diffusers on a channels-last array."""
    tensor = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    dtype = next(method.__self__.parameters()).dtype
    return method(tensor.to(dtype))[0].float().permute(0, 2, 3, 1).numpy()


@functools.cache
def abstract_params(config):
    images = jax.ShapeDtypeStruct(
        (1, config.factor, config.factor, config.in_channels), jnp.float32
    )
    return jax.eval_shape(DCAE(config).init, jax.random.key(0), images)["params"]


def count(params):
    leaves = traverse_util.flatten_dict(nn.unbox(params)).items()
    return sum(leaf.size for path, leaf in leaves if path[-1] not in ("mean", "var"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_released_sizes(name):
    params = abstract_params(_replace(PRESETS[name], scaling_factor=1.0))
    assert (count(params["encoder"]), count(params["decoder"])) == COUNTS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_of_diffusers(name):
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(config_json(PRESETS[name]))
    assert sum(p.numel() for p in vae.parameters()) == sum(COUNTS[name])


def test_batch_norm_statistics_are_weights():
    """The published f32c32-in file has 323,369,260 numbers, 12,800 of them running statistics."""
    config = _replace(PRESETS["dc-ae-f32c32-in-1.0"], scaling_factor=1.0)
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == 323_369_260


def test_weights_shard():
    """Every weight of a release divides over fsdp 4 x tensor 2, no mesh axis named twice."""
    params = abstract_params(_replace(PRESETS["dc-ae-f32c32-sana-1.0"], scaling_factor=1.0))
    shardings = shardings_for(params, make_mesh(replica=1, fsdp=4, tensor=2))
    shards = jax.tree.map(lambda s, p: s.shard_shape(p.shape), shardings, nn.unbox(params))
    total = sum(np.prod(s) for s in jax.tree.leaves(shards, is_leaf=lambda s: isinstance(s, tuple)))
    assert total < count(params) / 7


# At 64 x 96 the deepest attention sees fewer pixels than head_dim, where diffusers takes a
# quadratic path; at 192 x 256 no stage does.
@pytest.mark.parametrize(
    "config, shape",
    [
        (SANA, (2, 64, 96, 3)),
        (SANA, (1, 192, 256, 3)),
        (LITE, (1, 64, 96, 3)),
        (IN, (1, 96, 64, 3)),
        (F64, (1, 64, 128, 3)),
        (SMALL, (1, 40, 24, 3)),
    ],
    ids="sana sana-large lite in f64 small".split(),
)
def test_parity(config, shape):
    vae, (encode, decode) = pair(config)
    images = random_array(*shape)
    latents = theirs(vae.encode, images)
    ours = encode(images)
    assert ours.dtype == jnp.float32
    toy.assert_close(ours, latents, 1e-5, "encode")
    toy.assert_close(decode(latents), theirs(vae.decode, latents), 1e-5, "decode")


def test_bfloat16_error_is_no_larger_than_that_of_diffusers():
    """Reconstruction against float32, the median of eight sets of weights."""
    config, images = SMALL, random_array(1, 40, 24, 3)
    encode, decode = jitted(config, jnp.bfloat16)
    ours, reference = [], []
    for seed in range(8):
        vae = build(config, seed)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), toy.params(vae, config))
        exact = theirs(vae.forward, images)
        reconstruction = decode(params, encode(params, images))
        assert reconstruction.dtype == jnp.float32
        ours.append(toy.relative_error(reconstruction, exact))
        reference.append(toy.relative_error(theirs(vae.to(torch.bfloat16).forward, images), exact))
    ours, reference = np.median(ours), np.median(reference)
    print(f"bfloat16 error: ours {ours:.2e}, diffusers' {reference:.2e}")
    assert ours <= 1.5 * reference


def test_sides_must_be_multiples_of_the_factor():
    encode, _ = jitted(SMALL)
    params = toy.params(build(SMALL), SMALL)
    with pytest.raises(ValueError, match="30 x 24"):
        encode(params, random_array(1, 30, 24, 3))


def test_batch_norm_statistics_are_constants():
    x = random_array(1, 2, 2, 8)
    params = BatchNorm().init(jax.random.key(0), x)["params"]
    gradient = jax.grad(lambda p: jnp.sum(BatchNorm().apply({"params": p}, x) ** 2))(
        nn.unbox(params)
    )
    assert {k for k, v in gradient.items() if np.any(v != 0)} == {"scale", "bias"}


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
    once = object()
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
    alive = []

    def decode(latents):
        images = jnp.repeat(jnp.repeat(latents, 4, axis=1), 4, axis=2)
        alive.append(sum(array.shape == (1, 12, 12, 3) for array in jax.live_arrays()))
        return images

    tiled_decode(decode, random_array(1, 30, 10, 3), 12, 8, 4)
    assert len(alive) == 15 * 5
    assert 5 < max(alive) <= 2 * 5 + 1
