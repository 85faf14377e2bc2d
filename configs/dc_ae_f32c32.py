"""SANA's autoencoder at full size: f32c32, 312 M parameters, in three phases.

    python -m sana_jax.train_dc_ae --config=configs/dc_ae_f32c32.py --workdir=/mnt/shared/run \\
        --config.data.source=PHOTOS --config.perceptual.weights=vgg_lpips.safetensors --multihost

It is meant for a v5e 4x4 slice (16 chips of 16 GB, with the weights sharded over all of them): 16
images of 256 pixels on each chip, in four microbatches; in the second phase two images of 512
pixels, in two microbatches. A step of the first phase takes 3.2 of a chip's 15.75 GiB, according to
the TPU compiler (sana_jax.compile --memory). This config has not been run. Its learning rates are
the paper's; the numbers of steps and the batches are ours.
"""

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training.autoencoder.recipe import autoencoder


def get_config():
    config = autoencoder(DCAEConfig())
    config.remat = True
    # Without microbatches, the 16 images of a chip would need 24 GB.
    config.phases.low_resolution.microbatches = 4
    config.phases.latent_adaptation.update(image_size=512, microbatches=2)
    config.phases.local_refinement.microbatches = 4
    return config
