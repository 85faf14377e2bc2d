"""config.json of diffusers and transformers, read and written."""

import pytest
import torch
import transformers
from diffusers import AutoencoderDC

from sana_jax.checkpoints.diffusers_configs import (
    config_json,
    dc_ae_from_diffusers,
    gemma2_from_transformers,
    sana_from_diffusers,
)
from sana_jax.models import dc_ae_config, dit
from sana_jax.models.gemma2 import Gemma2Config
from tests.models.test_gemma2 import KINDS


def test_round_trip_of_a_transformer():
    for preset in dit.PRESETS.values():
        assert sana_from_diffusers(config_json(preset)) == preset
    # A config.json of an older diffusers leaves these out.
    old = config_json(dit.PRESETS["sana_1600m_1024"])
    for key in ("guidance_embeds", "guidance_embeds_scale", "qk_norm", "timestep_scale"):
        del old[key]
    assert sana_from_diffusers(old) == dit.PRESETS["sana_1600m_1024"]


def test_sprint_has_times_of_0_to_1_whatever_its_file_says():
    """As in diffusers, whose pipeline gives such times and does not read timestep_scale."""
    sprint = config_json(dit.PRESETS["sana_sprint_1600m_1024"])
    assert sprint["guidance_embeds"] and sprint["guidance_embeds_scale"] == 0.1
    found = sana_from_diffusers({**sprint, "timestep_scale": 1.0, "guidance_embeds_scale": 0.2})
    assert found.timestep_scale == 0.001 and found.guidance_embedding == 0.2


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(guidance_embeds=True, guidance_embeds_scale=None), "guidance_embeds_scale None"),
        (dict(guidance_embeds=True, guidance_embeds_scale=0), "guidance_embedding 0"),
        (dict(qk_norm="layer_norm"), "qk_norm"),
        (dict(cross_attention_dim=77), "cross_attention_dim"),
        (dict(out_channels=64), "out_channels"),
        (dict(norm_eps=1e-5), "norm_eps"),
    ],
)
def test_unsupported_transformers_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        sana_from_diffusers({**config_json(dit.PRESETS["sana_1600m_1024"]), **change})


@pytest.mark.parametrize("name", dc_ae_config.PRESETS)
def test_round_trip_of_an_autoencoder(name):
    config = dc_ae_config.PRESETS[name]
    with torch.device("meta"):
        vae = AutoencoderDC.from_config(config_json(config))
    assert dc_ae_from_diffusers(dict(vae.config)) == config
    assert hash(config) == hash(dc_ae_from_diffusers(config_json(config)))
    assert config.factor == vae.spatial_compression_ratio


def test_autoencoder_of_an_older_diffusers():
    with torch.device("meta"):
        full = dict(AutoencoderDC().config)
    assert dc_ae_from_diffusers({"_class_name": "AutoencoderDC"}) == dc_ae_from_diffusers(full)
    assert dc_ae_from_diffusers({**full, "downsample_block_type": "Conv"}).downsample == "conv"


@pytest.mark.parametrize(
    "key, value",
    [
        ("encoder_block_types", "EViTS5_GLU"),
        ("decoder_norm_types", ["rms_norm"] * 5 + ["layer_norm"]),
        ("decoder_act_fns", "gelu"),
        ("decoder_conv_act_fn", "mish"),
        ("downsample_block_type", "avg_pool"),
        ("upsample_block_type", "InterpolateConv"),
        ("decoder_layers_per_block", [3, 3, 3]),
        ("encoder_block_out_channels", [8] * 1000),
        ("encoder_layers_per_block", [2, 2, 0, 3, 3, 3]),
        ("encoder_block_out_channels", [128, 256, 512, 512, 1024, 1536]),
        ("attention_head_dim", 48),
    ],
)
def test_an_unsupported_autoencoder_is_named_as_diffusers_does(key, value):
    config = config_json(dc_ae_config.PRESETS["dc-ae-f32c32-sana-1.0"])
    with pytest.raises(ValueError, match=key):
        dc_ae_from_diffusers({**config, key: value})


@pytest.mark.parametrize("config", [Gemma2Config(), *KINDS.values()])
def test_round_trip_of_a_text_encoder(config):
    loaded = transformers.Gemma2Config(**config_json(config))
    assert gemma2_from_transformers(loaded.to_dict()) == config
    assert gemma2_from_transformers(config_json(config)) == config


def test_the_default_text_encoder_is_that_of_transformers():
    default = {**transformers.Gemma2Config().to_dict(), "architectures": ["Gemma2Model"]}
    assert transformers.Gemma2Config(**config_json(Gemma2Config())).to_dict() == default
    assert gemma2_from_transformers(default) == Gemma2Config()


def test_text_encoder_of_transformers_4():
    """No layer_types, rope_theta at the top, and both spellings of the activation."""
    config = dict(
        architectures=["Gemma2ForCausalLM"],
        attention_bias=False,
        attn_logit_softcapping=20.0,
        cache_implementation="hybrid",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        model_type="gemma2",
        num_hidden_layers=5,
        rope_theta=500.0,
        sliding_window=7,
    )
    expected = Gemma2Config(
        num_layers=5, attn_logit_softcap=20.0, rope_theta=500.0, sliding_window=7
    )
    assert gemma2_from_transformers(config) == expected
    assert expected.slides == (True, False, True, False, True)
    no_window = gemma2_from_transformers({**config, "sliding_window": None})
    assert no_window.slides == (False,) * 5


@pytest.mark.parametrize(
    "change",
    [
        dict(model_type="gemma"),
        dict(hidden_activation="gelu"),
        dict(hidden_activation="silu"),
        dict(attention_bias=True),
        dict(use_bidirectional_attention=True),
        dict(rope_scaling={"type": "linear", "factor": 2.0}),
        dict(rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0}),
        dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}),
        dict(layer_types=["full_attention", "chunked_attention"] * 13),
        dict(num_key_value_heads=3),
        dict(head_dim=15),
    ],
    ids=lambda change: str(*change),
)
def test_an_unsupported_text_encoder_is_named(change):
    config = {**transformers.Gemma2Config().to_dict(), **change}
    (field,) = change
    name = {"num_key_value_heads": "num_kv_heads"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        gemma2_from_transformers(config)


def test_a_text_encoder_without_a_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type None"):
        gemma2_from_transformers({})
