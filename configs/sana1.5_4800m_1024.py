"""Sana-1.5 4.8B at 1024 px, grown from the 1.6B: 60 blocks, 4,722 M parameters.

    python -m sana_jax.convert --source=RUN_1_5/model --out=GROWN --grow=60
    python -m sana_jax.train --config=configs/sana1.5_4800m_1024.py --workdir=RUN_4800M \\
        --config.start=GROWN --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost

RUN_1_5 is a training by sana1.5_1600m_1024.py, or a published 1.6B. SANA, PHOTOS and the slice are
as in sana_600m_512.py, with 4 images on each chip. This config has not been run. Optimizer (CAME
with a momentum of 8 bits), learning rate, warm-up, shift and bfloat16 are those of the authors'
configs, and so are the 16 images per device of the 3.2B; that of the 4.8B has 2. The number of
steps, the 64 devices that make up the batch and the moving average are ours; the paper says more
than 100,000 steps, and 1024 to 4096 images (arXiv 2501.18427).
"""

from sana_jax.training.text_to_image.recipe import full_size


def get_config():
    config = full_size("sana1.5_4800m_1024", steps=100_000, batch_size=1024)
    config.recipe.optimizer.update(learning_rate=2e-5, state_bits=8)
    return config
