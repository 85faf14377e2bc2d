"""The importance of a transformer's blocks: how far each one turns the residual stream.

    importance_i = 1 - mean cos(X_i, X_{i+1})

X_i is a token's state before block i; the mean is over tokens, prompts and timesteps (SANA-1.5,
arXiv 2501.18427, which prunes by it). Weights and inputs are those of SanaTransformer.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sana_jax.models.dit import Block, SanaTransformer


def turn(x: Float[Array, "*B C"], y: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """Returns 1 - cos(x, y) in float32.

    As half the squared distance of the unit vectors, it is 0 where x is y, and a small angle keeps
    its digits. No square overflows; a number that is not finite gives NaN.
    """

    def unit(v):
        v = v.astype(jnp.float32)
        v = v / jnp.maximum(jnp.abs(v).max(axis=-1, keepdims=True), 1e-30)
        return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-30)

    return jnp.sum((unit(x) - unit(y)) ** 2, axis=-1) / 2


class MeasuredBlock(Block):
    """A block that also says how far it turned its input, the mean over tokens."""

    def with_keys_values(self, x, keys_values, modulation, mask):
        after, _ = super().with_keys_values(x, keys_values, modulation, mask)
        return after, turn(x, after).mean(axis=(1, 2))


class MeasuredTransformer(SanaTransformer):
    """SanaTransformer with the method `importance`, on the same parameters."""

    def importance(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " #B"],
        keys_values: Float[Array, "depth B L C2"],
        mask: Bool[Array, "B L"],
        guidance: Float[Array, " #B"] | None = None,
    ) -> Float[Array, "depth B"]:
        """Returns the importance of every block where `denoise` computes each velocity."""
        found = []

        def blocks(x, modulation):
            inputs = x, (keys_values,), modulation, mask
            x, turns = self._scan("with_keys_values", *inputs, block=MeasuredBlock)
            found.append(turns)
            return x, None

        self._velocity(latents, timestep, guidance, blocks)
        return found[0]
