"""The figures of a LoRA."""

import jax
import pytest

from sana_jax.checkpoints.components import abstract_params
from sana_jax.lora.adapter import new_adapter
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError


def test_without_alpha_the_update_counts_once():
    assert LoraConfig(rank=16).scale == 1
    assert LoraConfig(rank=16, alpha=8).scale == 0.5


@pytest.mark.parametrize(
    "figures, told",
    [
        (dict(rank=-1), "rank -1"),
        (dict(rank=4, alpha=0.0), "alpha=0.0"),
        (dict(rank=4, dropout=1.0), "dropout=1.0"),
        (dict(rank=4, targets=()), "targets is empty"),
    ],
)
def test_bad_figures_are_refused(figures, told):
    with pytest.raises(UserError, match=told):
        LoraConfig(**figures)


@pytest.mark.parametrize(
    "figures, told",
    [
        (dict(rank=65), "rank=65"),
        (dict(rank=4, targets=("blocks/attention/w",)), "matches nothing"),
        (dict(rank=4, targets=("(",)), "targets"),
    ],
)
def test_figures_that_do_not_fit_the_network_are_refused(figures, told):
    config = SanaConfig(depth=1, width=64, head_dim=16, cross_heads=4, caption_channels=32)
    with pytest.raises(UserError, match=told):
        new_adapter(abstract_params(config), LoraConfig(**figures), jax.random.key(0))
