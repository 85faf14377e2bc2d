"""Sana-1.5 1.6B at 1024 px, from Sana 1.6B at 1024 px: queries and keys are normalised.

    python -m sana_jax.train --config=configs/sana1.5_1600m_1024.py --workdir=RUN_1_5 \\
        --config.start=RUN_1024/model --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost

RUN_1024 is a training by sana_1600m_1024.py, or a published checkpoint. It has no norms, so that
these start at one: the network differs at first, and a thousand steps or so bring it back, the
paper says (arXiv 2501.18427). A checkpoint with norms, such as
Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers, is trained further as it is.

SANA, PHOTOS and the slice are as in sana_600m_512.py, with 8 images on each chip. This config has
not been run. Optimizer, learning rate, warm-up, shift and bfloat16 are those of the authors'
config; the 32 images per device are of the one with AdamW and FSDP. The number of steps, the 64
devices that make up the batch and the moving average are ours.
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    config = full_size("sana1.5_1600m_1024", steps=20_000, batch_size=2048, encoder_microbatches=2)
    config.recipe.optimizer.learning_rate = 2e-5
    return config
