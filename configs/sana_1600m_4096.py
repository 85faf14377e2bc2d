"""Sana 1.6B at 4096 px, from the model at 2048 px: its positions, twice as dense.

    python -m sana_jax.train --config=configs/sana_1600m_4096.py --workdir=RUN_4096 \\
        --config.start=RUN_2048/model --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost

RUN_2048 is a training by sana_1600m_2048.py; SANA, PHOTOS and the slice are as in sana_600m_512.py.
This config has not been run. Optimizer, learning rate, warm-up, shift, positions, bfloat16 and the
4 images per device are those of the authors' config. The number of steps, the 64 devices that make
up the batch and the moving average are ours.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    config = full_size("sana_1600m_4096", steps=10_000, batch_size=256, encoder_microbatches=4)
    config.recipe.noise.shift = 6.0
    # Four chips share an image, by its rows, and encode one at a time: to encode one alone, a chip
    # would need 47 GiB. The rows at which parts meet are exchanged, so there are no tiles. The step
    # takes 12.5 of a v5e's 15.75 GiB, according to the TPU compiler (sana_jax.compile --memory).
    config.mesh.update(replica=1, sequence=4)
    config.evaluation.batch_size = 256
    return config
