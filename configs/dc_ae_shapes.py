"""The bundled autoencoder, on the built-in data set `shapes`: f32c32, 7.4 M parameters.

    python -m sana_jax.train_dc_ae --config=configs/dc_ae_shapes.py --workdir=DIR

Made for a CPU: 43 minutes on two cores that other work shared, 44,800 images in all. On the 1,000
test images at 128 px it reaches 27.0 dB and SSIM 0.896 (after phase 1: 27.4 dB); pictures are still
soft, small shapes round off. Longer is better: the error was falling when it ended. The weights in
sana_jax/assets/shapes had one irregularity: the first 3,774 steps of phase 1 ran on the cosine of a
7,000-step schedule, the others on this one's.
"""

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training import recipes

BLOCKS = ("ResBlock",) * 5 + ("EfficientViTBlock",)
NETWORK = DCAEConfig(
    encoder_blocks=BLOCKS,
    decoder_blocks=BLOCKS,
    # No blocks at full resolution: they would cost as much as all others together.
    encoder_channels=(16, 32, 64, 128, 256, 256),
    decoder_channels=(16, 32, 64, 128, 256, 256),
    encoder_layers=(0, 1, 1, 1, 1, 1),
    decoder_layers=(0, 1, 1, 1, 1, 1),
    encoder_qkv_multiscales=((),) * 6,
    decoder_qkv_multiscales=((),) * 6,
)


def get_config():
    config = recipes.autoencoder(NETWORK)
    config.dtype = "float32"
    config.perceptual.name = "laplacian"
    config.discriminator.update(width=32, layers=3)
    config.loader.update(threads=2, prefetch=2)
    config.loop.update(checkpoint_every=250, images_every=500)
    config.evaluation.update(images=500, sizes=(128, 256))

    phase = config.phases.low_resolution
    phase.update(steps=5000, image_size=128, batch_size=8)
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
