"""Sana 1.6B at 512 px from nothing: 1,604 M parameters.

    python -m sana_jax.train --config=configs/sana_1600m_512.py --workdir=RUN_512 \\
        --config.autoencoder=SANA --config.text_encoder.checkpoint=SANA \\
        --config.data.source=PHOTOS --multihost

SANA, PHOTOS and the slice are as in sana_600m_512.py, with 16 images on each chip. This config has
not been run. Optimizer, learning rate, warm-up, shift and the 64 images per device are those of the
authors' config, which runs in float16; the rest is ours, as there.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    return full_size("sana_1600m_512", steps=200_000, batch_size=4096)
