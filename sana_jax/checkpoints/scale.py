"""Checks that an autoencoder's scaling factor belongs to its weights.

The published autoencoders of one architecture have factors that differ by up to 1.4 times.
Weights under another autoencoder's config draw pictures that are too strong or too pale, without
any error.
"""

import jax
import numpy as np

from sana_jax.checkpoints.components import Checkpoint, module_for, place
from sana_jax.sharding import make_mesh

TOLERANCE = 0.3  # the latents' root mean square may differ from 1 by this much


def scene(side: int) -> np.ndarray:
    """Draws a picture in [-1, 1], (1, side, side, 3), with a photograph's shading, edges, grain."""
    y, x = np.mgrid[:side, :side] / side
    sky = np.stack([0.2 + 0.5 * y, 0.4 + 0.3 * y, 0.9 - 0.4 * y], axis=-1)
    ground = np.stack([0.35 + 0.1 * x, 0.5 - 0.2 * x, 0.2 + 0.1 * y], axis=-1)
    picture = np.where((y > 0.6 + 0.05 * np.sin(9 * x))[..., None], ground, sky)
    for centre_y, centre_x, radius, colour in (
        (0.25, 0.7, 0.12, (0.95, 0.85, 0.4)),
        (0.62, 0.3, 0.18, (0.7, 0.15, 0.1)),
    ):
        inside = (y - centre_y) ** 2 + (x - centre_x) ** 2 < radius**2
        picture = np.where(inside[..., None], np.multiply(colour, (1.2 - y)[..., None]), picture)
    picture += 0.03 * np.random.default_rng(0).standard_normal(picture.shape)
    return (2 * np.clip(picture, 0, 1) - 1).astype(np.float32)[None]


def latent_scale(checkpoint: Checkpoint) -> float:
    """Returns the root mean square of one picture's scaled latents: 1 if the factor is right."""
    config = checkpoint.vae
    mesh = make_mesh(devices=jax.local_devices()[:1])
    params = place(checkpoint.params["vae"], config, "float32", mesh)
    encode = jax.jit(lambda p, x: module_for(config, "float32").apply(p, x, method="encode"))
    latents = np.asarray(encode({"params": params}, scene(8 * config.factor)), np.float64)
    return float(np.sqrt(np.mean(latents**2)) * config.scaling_factor)
