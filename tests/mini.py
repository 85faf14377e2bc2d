"""A whole checkpoint that is smaller than tiny: drawing with it compiles in a few seconds."""

import dataclasses
from pathlib import Path

from sana_jax.checkpoints import native, random_weights
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig

FACTOR, NATIVE_SIZE = 4, 64


def save(folder: Path, seed: int = 0, depth: int = 1, **changes) -> None:
    """Writes it as a native folder; `changes` go to the transformer's config."""
    blocks, channels = ("ResBlock", "ResBlock", "EfficientViTBlock"), (8, 16, 32)
    autoencoder = DCAEConfig(
        latent_channels=8,
        encoder_blocks=blocks,
        decoder_blocks=blocks,
        encoder_channels=channels,
        decoder_channels=channels,
        encoder_layers=(1, 1, 1),
        decoder_layers=(1, 1, 1),
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        decoder_norms=("rms_norm",) * 3,
        decoder_activations=("silu",) * 3,
    )
    transformer = SanaConfig(
        depth=depth,
        width=32,
        latent_channels=8,
        cross_heads=1,
        caption_channels=48,
        **({"sample_size": 16} | changes),
    )
    *_, encoder = random_weights.configs(random_weights.TINY)
    configs = random_weights.configs
    try:
        random_weights.configs = lambda preset: (transformer, autoencoder, encoder)
        native.save(random_weights.make(random_weights.TINY, seed=seed), folder)
    finally:
        random_weights.configs = configs


def alone(folder: Path) -> Checkpoint:
    """The autoencoder of a native folder, without the rest."""
    whole = native.open_folder(folder)
    parts = dict.fromkeys(("dit", "text_encoder", "tokenizer", "instruction"))
    return dataclasses.replace(whole, **parts, params={"vae": whole.params["vae"]})
