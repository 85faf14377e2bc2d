"""The losses that the autoencoder and its discriminator are trained on.

Every loss is a mean over all elements, of images or of logits, so it depends neither on resolution
nor on batch. (Stable Diffusion's trainers sum over the pixels of an image instead: their weights
are not ours.) The formulas are those of VQGAN (arXiv 2012.09841, equations 5 to 7), whose trainers
DC-AE's published reproduction follows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def l1(reconstructions: Float[Array, "B H W C"], images: Float[Array, "B H W C"]) -> Array:
    """Returns the mean absolute error."""
    return jnp.mean(jnp.abs(reconstructions.astype(jnp.float32) - images))


def discriminator_loss(real: Float[Array, "*B"], fake: Float[Array, "*F"]) -> Array:
    """Returns the hinge loss of the discriminator's logits on images and on reconstructions.

    (mean relu(1 - real) + mean relu(1 + fake)) / 2 is 1 where the discriminator sees no difference,
    and 0 where it tells all of them apart by a margin of 1.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def generator_loss(fake: Float[Array, "*B"]) -> Array:
    """Returns -mean of the logits on reconstructions, which the autoencoder is to lower."""
    return -jnp.mean(fake.astype(jnp.float32))


def adaptive_weight(
    reconstruction_gradient: Any, generator_gradient: Any, maximum: float = 1e4
) -> Array:
    """Returns the weight by which the adversarial loss pulls on the last layer as the others do.

    ||g_rec|| / (||g_gen|| + 1e-4), at most `maximum`, held constant under differentiation; both
    gradients are trees with respect to the parameters of the decoder's last layer.

    The weight needs no second pass through the decoder, since gradients are linear: take the
    gradients of both losses with respect to the pixels, pull each back through the last layer alone
    (one jax.vjp), and pull `rec + weight * gen` back through the rest once. Where only the last
    layer trains (phase 3), the two pullbacks already are the gradients.
    """
    ratio = optax.tree.norm(reconstruction_gradient) / (optax.tree.norm(generator_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0, maximum))
