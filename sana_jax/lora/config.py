"""The figures of a LoRA that trains (Hu et al., arXiv 2106.09685), `config.lora` of a recipe."""

import dataclasses

from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError

# Queries, keys and values of both attentions: what diffusers' script trains on SANA.
ATTENTION = (r"blocks/(attention|cross_attention)/[qkv]",)
MAX_RANK = 2**12


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A LoRA's size and place; rank 0: there is none, and all weights train."""

    rank: int = 0
    alpha: float | None = None  # the update counts alpha / rank times; None: rank, so once
    # Regular expressions that match the whole names of sites (lora/adapter.py).
    targets: tuple[str, ...] = ATTENTION
    dropout: float = 0.0  # of the input of every update

    def __post_init__(self):
        checks.integer("rank", self.rank, 0, MAX_RANK)
        if self.alpha is not None:
            checks.positive("alpha", self.alpha)
        if not self.targets:
            raise UserError("targets is empty: name some, such as " + ATTENTION[0])
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout}: give 0 or more, below 1")

    @property
    def scale(self) -> float:
        """The factor of the update, alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
