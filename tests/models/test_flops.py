"""The counts, beside torch's own counter and beside figures that it gave for the full sizes."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderDC
from torch.utils.flop_counter import FlopCounterMode

from sana_jax.checkpoints.diffusers_configs import config_json, gemma2_from_transformers
from sana_jax.models import flops
from sana_jax.models.dc_ae_config import PRESETS as AUTOENCODERS
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import PRESETS
from sana_jax.models.gemma2 import Gemma2Config
from tests import toy

SIZES = 512, 1024, 2048, 4096


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("sana_600m_1024", (631, 2_243, 8_690, 34_478)),
        ("sana_1600m_1024", (1_673, 5_933, 22_974, 91_135)),
        ("sana1.5_4800m_1024", (4_995, 17_774, 68_892, 273_362)),
    ],
)
def test_trunk_at_full_size(preset, expected):
    """GFLOP of both halves of guidance with 300 rows of text."""
    counts = [2 * flops.trunk(PRESETS[preset], size // 32, size // 32, 300) for size in SIZES]
    assert tuple(round(count / 1e9) for count in counts) == expected


def test_autoencoder_at_full_size():
    encode, decode = (
        tuple(round(count(DCAEConfig(), size, size) / 1e9) for size in SIZES)
        for count in (flops.encode, flops.decode)
    )
    assert encode == (1_295, 5_180, 20_718, 82_874)
    assert decode == (2_092, 8_369, 33_474, 133_898)


def test_text_at_full_size():
    counts = [flops.text(Gemma2Config(), tokens) for tokens in (300, 520, 64, 1)]
    assert [round(count / 1e9) for count in counts] == [1234, 2163, 260, 4]


def counted(module, *args, method=None, **kwargs) -> int:
    module = module.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (method or module)(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"mlp_ratio": 3.3}])
def test_trunk_is_what_torch_counts(changes):
    module, config = toy.transformer(**changes)
    latents = torch.zeros(1, 8, 8, 12, device="meta")
    caption = torch.zeros(1, 7, 48, device="meta")
    timestep = torch.zeros(1, device="meta")
    named = dict(encoder_hidden_states=caption, timestep=timestep)
    assert flops.trunk(config, 8, 12, 7) == counted(module, latents, **named)


def test_variants_differ_by_what_torch_counts():
    config = PRESETS["sana_600m_512"]
    tokens, c, heads = 8 * 12, config.width, config.width // config.head_dim
    qkv = torch.zeros(3, 1, heads, tokens, config.head_dim, device="meta")
    own = flops.trunk(config, 8, 12, 7)
    softmax = flops.trunk(dataclasses.replace(config, attention="softmax"), 8, 12, 7)
    products = torch.nn.Identity()
    attention = counted(products, method=lambda: qkv[0] @ qkv[1].mT @ qkv[2])
    linear = 4 * tokens * c * (config.head_dim + 1)
    assert softmax - own == config.depth * (attention - linear)

    mlp = flops.trunk(dataclasses.replace(config, ffn="mlp"), 8, 12, 7)
    depthwise = 2 * 9 * tokens * 2 * int(config.mlp_ratio * c)
    assert own - mlp == config.depth * depthwise


SHUFFLED = dict(downsample="pixel_unshuffle", upsample="pixel_shuffle")
EMPTY = dict(encoder_layers=(0, 1, 2, 1, 1, 1), decoder_layers=(0, 1, 1, 1, 2, 1))
SCALES = dict.fromkeys(
    ("encoder_qkv_multiscales", "decoder_qkv_multiscales"), ((),) * 3 + ((5,), (), (3, 5))
)


@pytest.mark.parametrize("changes", [{}, SHUFFLED, EMPTY, SHUFFLED | EMPTY, SCALES])
def test_autoencoder_is_what_torch_counts(changes):
    widths = (8, 16, 16, 32, 32, 64)
    config = DCAEConfig(
        latent_channels=8,
        attention_head_dim=16,
        encoder_channels=widths,
        decoder_channels=widths,
        **changes,
    )
    with torch.device("meta"):
        module = AutoencoderDC.from_config(config_json(config))
    # Below 17 latents, its heads' width, diffusers takes the quadratic way.
    images = torch.zeros(1, 3, 160, 192, device="meta")
    latents = torch.zeros(1, 8, 5, 6, device="meta")
    assert flops.encode(config, 160, 192) == counted(module, images, method=module.encode)
    assert flops.decode(config, 160, 192) == counted(module, latents, method=module.decode)


def test_text_is_what_torch_counts():
    module = toy.text_encoder(100)
    config = gemma2_from_transformers(module.config.to_dict())
    tokens = torch.zeros(1, 11, dtype=torch.long, device="meta")
    assert flops.text(config, 11) == counted(module, tokens)


def test_every_published_autoencoder_is_counted():
    for config in AUTOENCODERS.values():
        assert flops.decode(config, 256, 256) > flops.encode(config, 256, 256) / 3 > 0
