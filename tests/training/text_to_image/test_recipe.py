"""A recipe's groups are dataclasses; bad figures are told by the key that the user writes."""

import re

import pytest

from sana_jax.data.loader import LoaderConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.checks import read_group
from sana_jax.runtime.errors import UserError
from sana_jax.training.loop import LoopConfig
from sana_jax.training.text_to_image.recipe import (
    EvaluationConfig,
    ImagesConfig,
    Recipe,
    check_figures,
    full_size,
    text_to_image,
)


def recipe(**changes):
    config = text_to_image(SanaConfig(), steps=20, batch_size=8)
    config.update_from_flattened_dict(changes)
    return config


def test_groups_are_read_as_what_wrote_them():
    config = recipe()
    loop = {"steps": 20} | config.loop.to_dict()
    assert read_group(LoopConfig, loop, "") == LoopConfig(20, log_every=20, checkpoint_every=500)
    assert read_group(LoaderConfig, config.loader.to_dict(), "") == LoaderConfig()
    assert read_group(ImagesConfig, config.images.to_dict(), "") == ImagesConfig()
    assert read_group(EvaluationConfig, config.evaluation.to_dict(), "") == EvaluationConfig(8)
    found = read_group(Recipe, config.recipe.to_dict(), "")
    assert (found.steps, found.optimizer.name, found.noise.shift) == (20, "came", 3.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "config.recipe.steps=0: give 1 to 2147483648"),
        ({"noise.std": 0.0}, "config.recipe.noise.std=0.0: give a positive number"),
        ({"optimizer.clip_norm": -1.0}, "config.recipe.optimizer.clip_norm=-1.0: give a positive"),
        ({"optimizer.state_bits": 4}, "config.recipe.optimizer.state_bits=4: give 32, or 8"),
    ],
    ids=str,
)
def test_bad_figures_are_told_by_their_keys(changes, message):
    config = recipe(**{f"recipe.{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        read_group(Recipe, config.recipe.to_dict(), "config.recipe")


def test_unknown_keys_are_told_with_their_group():
    with pytest.raises(UserError, match="^config.recipe.noise: .*'sigma'"):
        read_group(Recipe, {"steps": 1, "noise": {"sigma": 1}}, "config.recipe")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loader.bad_fraction": -0.1}, "config.loader.bad_fraction=-0.1: it is at least 0"),
        (
            {"loop.evaluate_every": 1, "evaluation.captions.temperature": 0.0},
            "config.evaluation.captions.temperature=0.0: give a number above 0",
        ),
        ({"loop.images_every": 1}, "config.images.prompts is empty"),
    ],
    ids=str,
)
def test_bad_groups_are_told_by_their_keys(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check_figures(recipe(**changes))


def test_figures_that_no_hook_will_use_are_left_alone():
    check_figures(recipe(**{"evaluation.batches": 0, "images.num_steps": 0}))


def test_none_stands_for_as_many_threads_as_there_are_cores():
    config = recipe()
    config.loader.threads = None
    check_figures(config)


def test_a_full_size_recipe_is_a_preset_and_a_batch():
    config = full_size("sana_600m_1024", steps=10, batch_size=4096, encoder_microbatches=4)
    check_figures(config)
    assert (config.network.width, config.recipe.steps, config.recipe.batch_size) == (1152, 10, 4096)
    # Held-out batches split over 256 chips and into the encoder's parts, as the training's do.
    assert config.evaluation.batch_size == 256 * config.recipe.encoder_microbatches == 1024
