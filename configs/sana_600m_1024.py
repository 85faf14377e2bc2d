"""Sana 0.6B at 1024 px, from the model at 512 px: 592 M parameters.

    python -m sana_jax.train --config=configs/sana_600m_1024.py --workdir=RUN_1024 \\
        --config.start=RUN_512/model --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost

RUN_512 is a training by sana_600m_512.py, where SANA, PHOTOS and the slice are explained; a
published checkpoint will do as well (Efficient-Large-Model/Sana_600M_512px_diffusers). There are 16
images on each chip. This config has not been run. Optimizer, learning rate, warm-up, shift and the
64 images per device are those of the authors' config, which runs in float16; the rest is ours.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    config = full_size("sana_600m_1024", steps=100_000, batch_size=4096, encoder_microbatches=4)
    config.recipe.noise.shift = 4.0  # of this stage alone: the 1.6B keeps 3
    return config
