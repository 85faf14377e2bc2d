"""Sana 0.6B at 512 px from nothing: 592 M parameters.

    python -m sana_jax.train --config=configs/sana_600m_512.py --workdir=/mnt/shared/run \\
        --config.autoencoder=SANA --config.text_encoder.checkpoint=SANA \\
        --config.data.source=PHOTOS --multihost

SANA is any Sana checkpoint, whose autoencoder, Gemma-2 2B and instruction are used. PHOTOS is a
folder of images with captions, which has train/ and test/ (or add --config.loop.evaluate_every=0),
or precomputed:DIR. The config is meant for a v5e 16x16 slice (256 chips of 16 GB): 32 images on
each chip, and four copies of the state, each sharded over 64 chips. This config has not been run.
Optimizer, learning rate, warm-up, shift and the 128 images per device are those of the authors'
config, which runs in float16. The number of steps, the 64 devices that make up the batch, bfloat16
and the moving average are ours.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    # The autoencoder encodes 16 images at a time. The step then takes 5.8 of a v5e's 15.75 GiB,
    # according to the TPU compiler (sana_jax.compile --memory).
    return full_size("sana_600m_512", steps=200_000, batch_size=8192, encoder_microbatches=2)
