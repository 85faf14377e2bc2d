"""What a request depends on of a checkpoint."""

import dataclasses

from sana_jax.checkpoints.components import MASKS, Checkpoint
from sana_jax.diffusion import scm
from sana_jax.pipeline.image_input import SPRINT_STRENGTH, STRENGTH

NUM_STEPS = 20  # of Flow-DPM-Solver and Euler, unless told otherwise


def usual_steps(is_sprint: bool) -> int:
    return scm.NUM_STEPS if is_sprint else NUM_STEPS


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a checkpoint that a request depends on."""

    factor: int  # pixels a side of a latent
    patch_size: int  # latents a side of a token
    native_size: int  # the side, in pixels, of the pictures that the network was trained on
    latent_channels: int
    text_rows: int
    caption_channels: int
    flow_shift: float
    is_sprint: bool = False  # drawn by SCM in a few steps; the network reads the guidance scale
    unconditional_mask: str = MASKS[0]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Facts":
        dit, vae = checkpoint.dit, checkpoint.vae
        return cls(
            factor=vae.factor,
            patch_size=dit.patch_size,
            native_size=dit.sample_size * vae.factor,
            latent_channels=vae.latent_channels,
            text_rows=checkpoint.text_rows,
            caption_channels=dit.caption_channels,
            flow_shift=checkpoint.flow_shift,
            unconditional_mask=checkpoint.unconditional_mask,
            is_sprint=dit.is_sprint,
        )

    @property
    def num_steps(self) -> int:
        """The steps of a picture, unless told otherwise."""
        return usual_steps(self.is_sprint)

    @property
    def strength(self) -> float:
        """The share of the steps that change a given picture, unless told otherwise."""
        return SPRINT_STRENGTH if self.is_sprint else STRENGTH
