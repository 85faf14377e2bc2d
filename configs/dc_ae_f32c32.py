"""SANA's autoencoder at full size: f32c32, 312 M parameters, three phases chained.

    python -m sana_jax.train_dc_ae --config=configs/dc_ae_f32c32.py --workdir=/mnt/shared/run \\
        --config.data.source=PHOTOS --config.perceptual.weights=vgg_lpips.safetensors --multihost

Meant for a v5e 4x4 slice (16 chips of 16 GB, weights sharded over all of them): 16 images of 256
pixels a chip in four microbatches; in the second phase two of 512 pixels, in two. The first phase's
step takes 3.2 of a chip's 15.75 GiB, by the TPU compiler (sana_jax.compile --memory). It has not
been run: its learning rates are the paper's, its numbers of steps and its batches are ours.
"""

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training.autoencoder.recipe import autoencoder


def get_config():
    config = autoencoder(DCAEConfig())
    config.remat = True
    # 16 images at once would need 24 GB.
    config.phases.low_resolution.microbatches = 4
    config.phases.latent_adaptation.update(image_size=512, microbatches=2)
    config.phases.local_refinement.microbatches = 4
    return config
