"""The bundled model's student, which draws in one to four steps: 4.0 M parameters.

    python -m sana_jax.train --config=configs/sprint_shapes.py --workdir=DIR \\
        --config.data.source=precomputed:LATENTS

LATENTS are those that launch/train_shapes stores. The teacher is `shapes` as it is: it has norms of
queries and keys, and its derivative in time is tame enough without an adaptation.
"""

from sana_jax.models.dit import SanaConfig
from sana_jax.training.distillation.recipe import distillation
from sana_jax.training.text_to_image.start import leave_open


def get_config():
    student = SanaConfig(guidance_embedding=0.1)  # and all else as the teacher
    config = leave_open(distillation(student, steps=2600, batch_size=64))
    config.network.guidance_embedding = student.guidance_embedding
    config.start = "shapes"
    config.recipe.update(batch_size=64, microbatches=1, ema_decay=0.998)
    config.unroll = 6
    for optimizer in config.recipe.optimizer, config.distillation.discriminator:
        optimizer.update(name="adamw", learning_rate=2.5e-4, schedule="cosine", warmup_steps=50)
        optimizer.update(clip_norm=1.0)
    config.distillation.update(guidance=(2.0,), warmup_steps=500, blocks=(1, 3, 5))
    config.data.captions.update(kind="score", temperature=1.0, threshold=27.0)
    config.loader.update(threads=1, prefetch=4)
    config.loop.update(log_every=25, checkpoint_every=250, images_every=500)
    return config
