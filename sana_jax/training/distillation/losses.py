"""The adversarial losses of the distillation; the hinge is the one of the autoencoder's training.

The discriminator's fakes are the student's latents and, where asked for, real latents under another
sample's caption (SANA-Sprint's code calls them misaligned pairs): a picture that fits its caption
is to win over one that does not. Both kinds are one batch, so each has half of the fakes' weight.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.training.autoencoder.losses import discriminator_loss, generator_loss

__all__ = ["discriminator_loss", "generator_loss", "misaligned"]


def misaligned(latents: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """Returns each sample's latents in the place of the next: none is at its caption, if B > 1."""
    return jnp.roll(latents, 1, axis=0)
