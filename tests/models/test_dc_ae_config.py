"""The autoencoder's config says which of its fields cannot be."""

import pytest

from sana_jax.models.dc_ae_config import PRESETS, DCAEConfig


@pytest.mark.parametrize(
    "field, value, problem",
    [
        ("encoder_channels", (128,), "needs 2 to 12 stages"),
        ("encoder_layers", (1, 2), "one entry for each of 6 stages"),
        ("encoder_layers", (2, 2, 0, 3, 3, 3), "only the first or last stage"),
        ("decoder_blocks", ("ResBlock",) * 5 + ("Block",), "only ResBlock and EfficientViTBlock"),
        ("decoder_norms", ("rms_norm",) * 5 + ("layer_norm",), "only rms_norm and batch_norm"),
        ("upsample", "InterpolateConv", "only interpolate and pixel_shuffle"),
        ("attention_head_dim", 48, "does not divide encoder_channels"),
        ("encoder_channels", (128, 256, 512, 512, 1024, 1536), "whole groups of channels"),
        ("latent_channels", -32, "a positive whole number"),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value, problem):
    with pytest.raises(ValueError, match=f"^autoencoder {field} .*{problem}"):
        DCAEConfig(**{field: value})


def test_the_factor_is_in_the_name_of_a_release():
    for name, config in PRESETS.items():
        assert f"-f{config.factor}c{config.latent_channels}-" in name
