"""Sana-Sprint 1.6B at 1024 px: a teacher made of Sana 1.6B, and its student of one to four steps.

    python -m sana_jax.train --config=configs/sprint_1600m_1024.py:teacher --workdir=RUN_TEACHER \\
        --config.start=RUN_1024/model --config.autoencoder=SANA \\
        --config.text_encoder.checkpoint=SANA --config.data.source=PHOTOS --multihost
    python -m sana_jax.train --config=configs/sprint_1600m_1024.py --workdir=RUN_SPRINT \\
        --config.start=RUN_TEACHER/model --config.data.source=PHOTOS --multihost

The first command trains the teacher further, so that its derivative in time is tame: timesteps run
over 0 .. 1 instead of 0 .. 1000, and queries and keys of both attentions are normalised. The second
distils it (training/distillation/). RUN_1024 is a training by sana_1600m_1024.py; SANA, PHOTOS and
the slice are as in sana_600m_512.py. This config has not been run. The teacher's rate, 5,000 steps
and batch are the paper's (arXiv 2503.09641), as are the student's batch and 20,000 steps;
optimizer, its rate, warm-up and clipping are of the authors' config. The slice and the moving
average are ours.
"""

from sana_jax.diffusion.flow import NUM_TIMESTEPS
from sana_jax.training.distillation.recipe import distillation
from sana_jax.training.text_to_image.recipe import full_size


def get_config(kind="student"):
    if kind == "student":
        return full_size("sana_sprint_1600m_1024", 20_000, 512, make=distillation)
    if kind != "teacher":
        raise ValueError(f"{kind} is neither teacher nor student")
    config = full_size("sana1.5_1600m_1024", steps=5000, batch_size=1024)
    config.network.timestep_scale = 1 / NUM_TIMESTEPS
    config.recipe.optimizer.learning_rate = 2e-5
    return config
