"""A recipe's groups are dataclasses; bad figures are told by the key that the user writes."""

import re

import pytest

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.runtime.checks import read_group
from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder.recipe import (
    PHASES,
    CachingLoaderConfig,
    autoencoder,
    check_figures,
)
from sana_jax.training.autoencoder.task import Phase
from sana_jax.training.loop import LoopConfig


def test_groups_are_read_as_what_wrote_them():
    config = autoencoder(DCAEConfig())
    check_figures(config)
    loop = {"steps": 20} | config.loop.to_dict()
    assert read_group(LoopConfig, loop, "") == LoopConfig(20, images_every=1000)
    assert read_group(CachingLoaderConfig, config.loader.to_dict(), "") == CachingLoaderConfig()
    phases = config.phases.to_dict()
    assert {name: read_group(Phase, phases[name], "") for name in config.run} == PHASES


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loop.log_every": -1}, "config.loop.log_every=-1: it is at least 0"),
        ({"loader.threads": -1}, "config.loader.threads=-1: it is at least 0"),
        ({"evaluation.images": 0}, "config.evaluation.images=0: it is at least 1"),
        ({"data.shapes.test": 0}, "config.data.shapes.test=0: it is at least 1"),
    ],
    ids=str,
)
def test_bad_figures_are_told_by_their_keys(changes, message):
    config = autoencoder(DCAEConfig())
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_figures(config)
