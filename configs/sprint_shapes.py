"""A student of the bundled model, which draws in one to four steps: 4.0 M parameters.

    python -m sana_jax.convert --source=shapes --dense_time --out=TEACHER
    python -m sana_jax.train --config=configs/sprint_shapes.py --workdir=FIRST \\
        --config.start=TEACHER --config.data.source=precomputed:LATENTS
    python -m sana_jax.train --config=configs/sprint_shapes.py:both --workdir=SECOND \\
        --config.start=TEACHER --config.student=FIRST/model --config.data.source=precomputed:LATENTS

The second command trains by sCM alone, the third goes on with LADD too.
LATENTS are those that launch/train_shapes stores. In place of an adaptation the first command fits
the timestep embedder to the scale 0 .. 1, which takes half a minute and leaves 12 % of its spread.
On the scale 0 .. 1000 the student's derivative in time grows spikes, most of all near pure noise:
one step from pi/2 had 16 % of the prompts right where one from 1.5 had 52 %.

The first layer of the embedder does not train: on the new scale its inputs are nearly the same at
all times, so that Adam moves its outputs all at once. Two students whose first layer trained, at
2e-4 and 4e-4 and with the derivative's whole share from the first step, diverged within 150 steps
(`teacher_error` in metrics.jsonl tells early: it stays near 0.16 where all is well); on the old
scale one at 1e-3 did.

LADD has to weigh much here: by itself its gradient is 1 to 3 long, that of sCM's loss 45, and with
the paper's weight of 0.5 nothing changed. What its discriminator tells apart are latents with the
captions of others: the student's own have the logits of real ones. The bundled `shapes-sprint` was
made so: configs/README.md.
"""

from sana_jax.models.dit import SanaConfig
from sana_jax.training.distillation.recipe import distillation
from sana_jax.training.text_to_image.start import leave_open


def get_config(kind="consistency"):
    if kind not in ("consistency", "both"):
        raise ValueError(f"{kind} is neither consistency nor both")
    student = SanaConfig(guidance_embedding=0.1)  # and all else as the teacher
    config = leave_open(distillation(student, steps=5_800, batch_size=64))
    config.network.guidance_embedding = student.guidance_embedding
    config.recipe.update(batch_size=64, microbatches=1, ema_decay=0.99)
    config.unroll = 6
    for optimizer in config.recipe.optimizer, config.distillation.discriminator:
        optimizer.update(name="adamw", learning_rate=2.5e-4, schedule="cosine", warmup_steps=50)
        optimizer.update(clip_norm=1.0, beta2=0.99)
    # The teacher draws best with a guidance of 2, and no other is learnt.
    config.distillation.update(guidance=(2.0,), warmup_steps=300, adversarial=0.0)
    config.distillation.update(blocks=(1, 3, 5), trainable=(r"(?!dit/time_embed/linear_1/).*",))
    if kind == "both":
        config.recipe.steps = 2_400  # half of them the discriminator's
        config.recipe.optimizer.learning_rate = 1e-4
        config.distillation.discriminator.learning_rate = 3e-3
        config.distillation.update(warmup_steps=1, adversarial=20.0, misaligned=True)
    config.data.captions.update(kind="score", temperature=1.0, threshold=27.0)
    config.loader.update(threads=1, prefetch=4)
    config.loop.update(log_every=25, checkpoint_every=250)
    return config
