"""The config of a tiny distillation, with its teacher and its pictures."""

import jax
import pytest

from tests.training.text_to_image.toy import prepare

CONFIG = """
from sana_jax.models.dit import SanaConfig
from sana_jax.training.distillation.recipe import distillation

NETWORK = SanaConfig(depth=1, width=32, latent_channels=8, cross_heads=1, caption_channels=48,
                     sample_size=16, guidance_embedding=0.1)

def get_config():
    config = distillation(NETWORK, steps=6, batch_size=8)
    config.start = config.autoencoder = config.text_encoder.checkpoint = FOLDER + "/base"
    config.text_encoder.rows = 8
    config.dtype = "float32"
    config.data.update(source=FOLDER + "/photos", size=16)
    for optimizer in config.recipe.optimizer, config.distillation.discriminator:
        optimizer.update(name="adamw", warmup_steps=0, learning_rate=3e-3)
    config.distillation.update(blocks=(0,), warmup_steps=2, guidance=(2.0, 4.0))
    config.loop.update(log_every=2, checkpoint_every=1)
    config.loader.update(threads=1, prefetch=1)
    config.images.update(prompts=("a red cat",), num_steps=1)
    return config
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = prepare(tmp_path_factory.mktemp("toy"))
    path.write_text(CONFIG.replace("FOLDER", repr(str(path.parent))))
    return path


@pytest.fixture(scope="module")
def one_device():
    """Eight compile for longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
        yield
