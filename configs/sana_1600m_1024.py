"""Sana 1.6B at 1024 px, from a model at 512 px: 1,604 M parameters.

    python -m sana_jax.train --config=configs/sana_1600m_1024.py --workdir=/mnt/shared/run \\
        --config.autoencoder=SANA --config.text_encoder.checkpoint=SANA \\
        --config.start=RUN_512/model --config.data.source=PHOTOS --multihost

SANA and PHOTOS are as in sana_600m_512.py; RUN_512 is a training of the 1.6B model at 512 px, from
whose weights this stage starts. It is meant for a v5e 16x16 slice (256 chips of 16 GB): 16 images
on each chip, and four copies of the state, each sharded over 64 chips. This config has not been
run. Optimizer, learning rate, warm-up, shift, bfloat16 and the 64 images per device are those of
the authors' config. The number of steps, the 64 devices that make up the batch and the moving
average are ours.
"""

from sana_jax.models.dit import PRESETS
from sana_jax.training.text_to_image.recipe import PROMPTS, text_to_image


def get_config():
    config = text_to_image(PRESETS["sana_1600m_1024"], steps=100_000, batch_size=4096)
    config.mesh.update(replica=4, fsdp=64)
    config.remat = "full"
    config.data.buckets = True
    # The autoencoder encodes 4 images at a time. The step then takes 9.9 of a v5e's 15.75 GiB,
    # according to the TPU compiler (sana_jax.compile --memory).
    config.recipe.encoder_microbatches = 4
    config.evaluation.batch_size = 1024  # splits over the chips as the training's does
    config.loop.update(images_every=500, evaluate_every=500)
    config.images.prompts = PROMPTS
    return config
