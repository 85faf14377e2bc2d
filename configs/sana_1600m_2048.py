"""Sana 1.6B at 2048 px, from the model at 1024 px: positions are added, and no weight.

    python -m sana_jax.train --config=configs/sana_1600m_2048.py --workdir=RUN_2048 \\
        --config.start=RUN_1024/model --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost

RUN_1024 is a training by sana_1600m_1024.py; SANA, PHOTOS and the slice are as in sana_600m_512.py,
with one image on each chip. This config has not been run. Optimizer, learning rate, warm-up, shift,
positions, bfloat16 and the 4 images per device are those of the authors' config. The number of
steps, the 64 devices that make up the batch and the moving average are ours.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    # The step takes 12.3 of a v5e's 15.75 GiB, according to the TPU compiler.
    return full_size("sana_1600m_2048", steps=20_000, batch_size=256)
