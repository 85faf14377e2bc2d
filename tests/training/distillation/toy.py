"""A tiny teacher, its student, and a task that distils the one into the other."""

import dataclasses
import functools

import jax
import numpy as np
from flax import linen as nn

from sana_jax.checkpoints.components import init_params, module_for
from sana_jax.models.dit import SanaConfig
from sana_jax.training.distillation.task import DistillationConfig, DistillationTask
from sana_jax.training.optimizers.optimizers import OptimizerConfig
from sana_jax.training.text_to_image.task import Frozen, Recipe

TEACHER = SanaConfig(
    depth=2,
    width=16,
    head_dim=8,
    latent_channels=4,
    cross_heads=2,
    caption_channels=6,
    qk_norm=True,
    timestep_scale=0.001,
)
STUDENT = dataclasses.replace(TEACHER, guidance_embedding=0.1)
ADAMW = OptimizerConfig(learning_rate=1e-3, eps=1e-6)
RECIPE = Recipe(8, 4, ADAMW, caption_dropout=0.0, ema_decay=0.9)
FIGURES = DistillationConfig(blocks=(0, 1), discriminator=ADAMW, warmup_steps=2)
ROWS = 5


@functools.cache
def make_task(figures=FIGURES, recipe=RECIPE, dtype="float32"):
    networks = module_for(STUDENT, dtype), module_for(TEACHER, dtype), None, None
    return DistillationTask(recipe, *networks, None, figures)


def random_params(config, seed=0):
    """Returns parameters of which none is zero or one, which wrong formulas could hide behind."""
    rng = np.random.default_rng(seed)
    init = functools.partial(init_params, module_for(config, "float32"))
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))

    def draw(x):
        return (rng.standard_normal(x.shape) / max(x.shape) ** 0.5).astype(np.float32)

    return jax.tree.map(draw, shapes)


def make_batch(rows=4):
    rng = np.random.default_rng(1)
    return {
        "latents": rng.standard_normal((rows, 2, 2, 4)).astype(np.float32),
        "embeddings": rng.standard_normal((rows, ROWS, 6)).astype(np.float32),
        "mask": np.arange(ROWS)[None] < 2 + np.arange(rows)[:, None],
    }


@functools.cache
def frozen():
    null = np.random.default_rng(2).standard_normal((ROWS, 6)).astype(np.float32)
    return Frozen(None, null=(null, np.arange(ROWS) < 1), dit=random_params(TEACHER))
