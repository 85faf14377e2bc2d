"""The bundled autoencoder, on the built-in data set `shapes`: f32c32, 7.4 M parameters.

    python -m sana_jax.train_dc_ae --config=configs/dc_ae_shapes.py --workdir=DIR

It is made for two CPU cores: about an hour at 36 images/s. This trainer made the weights in
sana_jax/assets/shapes in five runs, each of which started from the run before (config.start):

1. 5,000 steps of phase 1 at 6e-4, on version 1 of the data, whose objects are smaller;
2. 2,750 of 10,000 steps of phase 1 at 5e-4, on version 1;
3. 8,000 steps of phase 1 at 5e-4, and phases 2 and 3, on version 2;
4. phases 1 and 3 with 80,000 pictures, 12,500 and 400 steps, in which only the decoder trained;
5. with the same pictures and seed 3, 10,000 steps of phase 1 with the losses below, and phase 3.

Before the last run the losses were L1 and a quarter of the pyramid's, for which the blurred tips of
a small star count little beside a large background that nearly fits. The last run took 40 minutes,
and raised PSNR at 128 px from 30.9 to 33.2 dB. (We did not run the control: the same steps with the
old losses. Nor did we run the steps below in one run.)
"""

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training.autoencoder.recipe import autoencoder

BLOCKS = ("ResBlock",) * 5 + ("EfficientViTBlock",)
NETWORK = DCAEConfig(
    encoder_blocks=BLOCKS,
    decoder_blocks=BLOCKS,
    # No blocks at full resolution, where they would cost as much as all others together.
    encoder_channels=(16, 32, 64, 128, 256, 256),
    decoder_channels=(16, 32, 64, 128, 256, 256),
    encoder_layers=(0, 1, 1, 1, 1, 1),
    decoder_layers=(0, 1, 1, 1, 1, 1),
    encoder_qkv_multiscales=((),) * 6,
    decoder_qkv_multiscales=((),) * 6,
)


def get_config():
    config = autoencoder(NETWORK)
    config.dtype = "float32"
    config.perceptual.name = "laplacian"
    config.discriminator.update(width=32, layers=3)
    config.loader.update(threads=2, prefetch=2)
    config.loop.update(checkpoint_every=250, images_every=500)
    config.evaluation.update(images=500, sizes=(128, 256))
    config.data.shapes.train = ((128, 40_000), (256, 4_000))

    phase = config.phases.low_resolution
    phase.update(steps=16_000, image_size=128, batch_size=8, l1=0.25, l2=4.0)
    phase.autoencoder.update(
        learning_rate=6e-4, schedule="cosine", warmup_steps=100, weight_decay=0.01, beta2=0.99
    )
    phase = config.phases.latent_adaptation
    phase.update(steps=200, image_size=256, batch_size=8, ema_decay=0.98)
    phase.autoencoder.update(learning_rate=2e-4, schedule="cosine", warmup_steps=20)
    phase = config.phases.local_refinement
    phase.update(steps=400, image_size=128, batch_size=8, ema_decay=0.98)
    phase.autoencoder.update(learning_rate=2e-4, schedule="cosine", warmup_steps=20)
    phase.discriminator.update(learning_rate=2e-4, warmup_steps=20)
    return config
