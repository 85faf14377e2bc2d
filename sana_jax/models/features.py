"""The tokens inside a transformer, after chosen blocks.

Sprint's discriminator judges latents by those of the frozen teacher (LADD, arXiv 2403.12015,
section 3). Weights and inputs are those of SanaTransformer.
"""

from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sana_jax.models.dit import Block, SanaTransformer
from sana_jax.models.remat import REMAT


class FeatureTransformer(SanaTransformer):
    """SanaTransformer with the method `features`, on the same parameters."""

    def features(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " #B"],
        caption: Float[Array, "B L T"],
        mask: Bool[Array, "B L"],
        blocks: tuple[int, ...],
        guidance: Float[Array, " #B"] | None = None,
    ) -> tuple[Float[Array, "B N C"], ...]:
        """Returns the tokens after each of `blocks`, of which 0 is the first; no later block runs.

        The other inputs are those of `__call__`. They may be differentiated, and `remat` decides
        what is kept for that; the weights are meant to be frozen. Raises ValueError for blocks that
        do not rise, or that the network does not have.
        """
        depth = self.config.depth
        if not blocks or sorted({-1, *blocks, depth}) != [-1, *blocks, depth]:
            raise ValueError(f"blocks {blocks}: expected rising numbers of 0 .. {depth - 1}")
        caption = self.caption_embed(caption)
        block = Block
        if policy := REMAT[self.remat]:
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        found = []

        def run(x, modulation):
            shared = modulation, caption, mask
            for first, last in zip((0, *(b + 1 for b in blocks)), blocks, strict=False):
                layers = slice(first, last + 1)
                x, _ = self._scan("__call__", x, (), *shared, block=block, layers=layers)
                found.append(x.reshape(x.shape[0], -1, x.shape[-1]))
            return x, None

        # The velocity that is computed from the last tokens is not used, and not compiled.
        self._predict(latents, timestep, guidance, run)
        return tuple(found)
