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
from sana_jax.models import dc_ae
from sana_jax.models.dc_ae import DCAE, BatchNorm
from sana_jax.models.dc_ae_config import PRESETS, DCAEConfig
from sana_jax.sharding import batch_sharding, make_mesh, shardings_for
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


def test_devices_that_share_an_image_by_its_rows_find_the_same_latents():
    """None holds more than its rows: it asks its neighbours for those next to them."""
    params = toy.params(build(SMALL), SMALL)
    images, (encode, _) = random_array(2, 64, 32, 3), jitted(SMALL)
    mesh = make_mesh(replica=1, fsdp=2, sequence=4, devices=toy.devices(8))
    with jax.set_mesh(mesh):
        placed = jax.device_put(images, batch_sharding(mesh))
        program = jax.jit(encode.__wrapped__).lower(params, placed).compile()
        shared = program(params, placed)
    np.testing.assert_allclose(shared, encode(params, images), rtol=1e-5, atol=1e-5)
    text = program.as_text()
    assert "collective-permute" in text and "all-gather" not in text
    # The first activations of an image are 32 x 16 x 16, a device's rows of it 8 x 16 x 16.
    assert "f32[1,8,16,16]" in text and "f32[1,32,16,16]" not in text


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


def test_parity_by_the_operations_that_have_a_kernel(monkeypatch):
    """Their plain forms, with the weights of the modules; tests/kernels has the kernels."""
    for room, name in (dc_ae.upsampling, "upsample"), (dc_ae.image_head, "image_head"):
        monkeypatch.setattr(room, "uses_kernel", lambda *args: True)
        monkeypatch.setattr(room, name, getattr(room.reference, name))
    config = _replace(SMALL, decoder_layers=(1, 1, 1))
    vae, latents = build(config), random_array(1, 6, 10, 16)
    params = {"params": toy.params(vae, config)}
    found = jax.jit(lambda: DCAE(config).apply(params, latents, method="decode"))()
    toy.assert_close(found, theirs(vae.decode, latents), 1e-5, "decode")


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
