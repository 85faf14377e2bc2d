"""The data suffices for every phase, or is refused before anything is written."""

import re

import numpy as np
import pytest

from sana_jax.runtime.errors import Retry, UserError
from sana_jax.training.autoencoder.run import AutoencoderTraining
from tests.training.autoencoder.toy import PHASES, SHAPES, load


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"phases.local_refinement.crop": "middle", **SHAPES},
            "config.phases.local_refinement.crop='middle'",
        ),
        ({"phases.local_refinement.crop": "middle"}, "config.phases.local_refinement.crop="),
        ({"data.source": "precomputed:here"}, "precomputed:here: these are latents; give images"),
        ({"phases.local_refinement.crop": "centre"}, "local_refinement.flip=True: crop='centre'"),
        ({"data.source": "nowhere"}, "nowhere: there is no such folder"),
        # Data that only a later phase lacks.
        (
            {"data.source": "shapes", "data.shapes.train": ((32, 20),)},
            "config.data.shapes.train=((32, 20),): give (48, COUNT) too",
        ),
        (
            {"data.source": "shapes", "data.shapes.train": ((32, 20), (48, 7))},
            "give (48, COUNT) too, COUNT 8 or more",
        ),
        (
            {"phases.local_refinement.batch_size": 16},
            "config.phases.local_refinement.batch_size=16: ",
        ),
        (
            {"phases.latent_adaptation.image_size": 64},
            "config.phases.latent_adaptation.image_size=64: none of the first records",
        ),
    ],
    ids=str,
)
def test_data_that_does_not_suffice_is_refused_before_anything_is_written(
    config, tmp_path, changes, message
):
    with pytest.raises(UserError, match=re.escape(message)):
        AutoencoderTraining(load(config, **changes), str(tmp_path / "run")).run()
    assert not (tmp_path / "run").exists()


def test_images_kept_in_memory_change_no_batch_and_no_fingerprint(config):
    training = AutoencoderTraining(load(config), "/nonexistent")
    found = []
    for cache in (4.0, 0.0):
        training.config.loader.cache_gib = cache
        loader = training.data.loader(training.tasks[PHASES[0]].phase, 0)
        images = [loader.batch(step)["image"] for step in range(4)]  # 16 of 12 images
        found.append((loader.fingerprint, np.stack(images)))
        assert len(loader.source._kept) == (12 if cache else 0)
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_data_that_is_away_when_a_run_comes_back_is_worth_a_retry(config, tmp_path):
    (tmp_path / "run" / PHASES[1] / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(Retry, match="nowhere: there is no such folder.*it was there before"):
        AutoencoderTraining(load(config, **{"data.source": "nowhere"}), str(tmp_path / "run"))


def test_the_limit_of_pixels_is_the_configs(config, tmp_path):
    AutoencoderTraining(load(config, **{"data.max_pixels": 64 * 56}), str(tmp_path))
    with pytest.raises(UserError, match="none of the first records can be used.*too_many_pixels"):
        AutoencoderTraining(load(config, **{"data.max_pixels": 64 * 56 - 1}), str(tmp_path))
    for pixels in 0, 10**9:
        with pytest.raises(UserError, match=f"^config.data.max_pixels={pixels}: give 1 to"):
            AutoencoderTraining(load(config, **{"data.max_pixels": pixels}), str(tmp_path))
