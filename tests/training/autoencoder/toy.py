"""A tiny autoencoder's training of three phases: its pictures and its config."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

# The built-in data set in place of the pictures.
SHAPES = {"data.source": "shapes", "data.shapes.train": ((32, 20), (48, 20))}
PHASES = ("low_resolution", "latent_adaptation", "local_refinement")
CONFIG = """
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training.autoencoder.recipe import autoencoder

BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")

def get_config():
    config = autoencoder(DCAEConfig(
        latent_channels=4, attention_head_dim=8, encoder_blocks=BLOCKS, decoder_blocks=BLOCKS,
        encoder_channels=(8, 8, 16), decoder_channels=(8, 8, 16), encoder_layers=(0, 1, 1),
        decoder_layers=(0, 1, 1), encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3, decoder_norms=("rms_norm",) * 3,
        decoder_activations=("silu",) * 3))
    config.data.source = PHOTOS
    config.dtype = "float32"
    config.perceptual.name = "laplacian"
    config.discriminator.update(width=8, layers=2)
    config.evaluation.update(images=6, batch_size=4, sizes=(32, 48))
    config.scale_images = 8
    config.loader.update(threads=1, prefetch=1)
    config.loop.update(log_every=2, checkpoint_every=3, images_every=5)
    for phase, size in zip(config.run, (32, 48, 32)):
        config.phases[phase].update(steps=10, batch_size=4, image_size=size)
        config.phases[phase].autoencoder.learning_rate = 3e-3
    return config
"""


def prepare(folder: Path) -> Path:
    """Writes pictures that are smooth enough to be learnt from, and the config's file."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        (folder / split).mkdir()
        for i in range(count):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
            small.resize((64, 56), Image.BICUBIC).save(folder / split / f"{i}.png")
    path = folder / "config.py"
    path.write_text(CONFIG.replace("PHOTOS", repr(str(folder))))
    return path


def load(path: Path, **changes) -> ConfigDict:
    """Returns the config in the file, for eight devices, with changes by dotted keys."""
    namespace = {}
    exec(path.read_text(), namespace)
    config = namespace["get_config"]()
    for phase in config.phases.values():
        phase.batch_size = 8
    config.update_from_flattened_dict(changes)
    return config
