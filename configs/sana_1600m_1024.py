"""Sana 1.6B at 1024 px, from the model at 512 px: 1,604 M parameters.

    python -m sana_jax.train --config=configs/sana_1600m_1024.py --workdir=RUN_1024 \\
        --config.start=RUN_512/model --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost

RUN_512 is a training by sana_1600m_512.py, from whose weights this stage starts; SANA, PHOTOS and
the slice are as in sana_600m_512.py, with 16 images on each chip. This config has not been run.
Optimizer, learning rate, warm-up, shift, bfloat16 and the 64 images per device are those of the
authors' config. The number of steps, the 64 devices that make up the batch and the moving average
are ours.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    # The autoencoder encodes 4 images at a time. The step then takes 9.9 of a v5e's 15.75 GiB,
    # according to the TPU compiler (sana_jax.compile --memory).
    return full_size("sana_1600m_1024", steps=100_000, batch_size=4096, encoder_microbatches=4)
