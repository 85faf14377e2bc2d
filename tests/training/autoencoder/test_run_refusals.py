"""A config that cannot be trained is refused before anything is written."""

import re

import pytest

from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder.run import AutoencoderTraining
from tests.training.autoencoder.toy import SHAPES, load


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"phases.low_resolution.image_size": 33}, "image_size=33: it is a multiple of 4"),
        ({"phases.low_resolution.batch_size": 0}, "batch_size=0: it is a multiple of 8"),
        ({"phases.low_resolution.microbatches": 3}, "batch_size=8: it is a multiple of 24"),
        ({"phases.low_resolution.trainable": ("decoder/none",)}, "matches no parameter"),
        (
            {"phases.low_resolution.autoencoder.name": "sgd"},
            "autoencoder.name 'sgd' is unknown",
        ),
        ({"phases.low_resolution.steps": 0}, "steps=0"),
        (
            {"phases.low_resolution.image_size": 0},
            "low_resolution.image_size=0: it is at least 1",
        ),
        ({"phases.low_resolution.microbatches": 0}, "microbatches=0: it is at least 1"),
        ({"phases.low_resolution.ema_decay": 1.5}, "low_resolution.ema_decay=1.5: give 0 to 1"),
        ({"seed": -1, **SHAPES}, "config.seed=-1: it is at least 0"),
        ({"keep": 0}, "config.keep=0: it is at least 1"),
        ({"loop.watchdog_seconds": -1.0}, "config.loop.watchdog_seconds=-1.0: it is at least 0"),
        ({"evaluation.batch_size": 0, **SHAPES}, "config.evaluation.batch_size=0"),
        ({"evaluation.images": 0, **SHAPES}, "config.evaluation.images=0"),
        ({"data.shapes.test": 0, **SHAPES}, "config.data.shapes.test=0"),
        ({"network.latent_channels": 5}, "autoencoder encoder_channels"),
        ({"perceptual.name": "lpips_vgg"}, "lpips_vgg needs its published weights"),
        ({"perceptual.name": "vgg"}, "'vgg' is not one of lpips_vgg"),
        ({"run": ("low_resolution", "third")}, "name some of its phases"),
        ({"mesh.replica": 3, "mesh.fsdp": 1}, "does not fit 8 devices"),
        ({"discriminator.norm": "batch"}, "norm 'batch' is not one of"),
        ({"dtype": "float99"}, "float99"),
        ({"evaluation.sizes": (30,)}, "sizes=(30,)"),
        (
            {"phases.low_resolution.autoencoder.warmup_steps": 11},
            "config.phases.low_resolution.autoencoder.warmup_steps=11: give 0 to steps=10",
        ),
        (
            {"phases.local_refinement.discriminator.schedule": "step"},
            "config.phases.local_refinement.discriminator.schedule 'step'",
        ),
        ({"loader.prefetch": 10**9}, "config.loader.prefetch=1000000000: give a number up to"),
        ({"evaluation.sizes": (10**9,)}, "config.evaluation.sizes=1000000000: give a number up"),
        (
            {"phases.low_resolution.perceptual": float("nan")},
            "config.phases.low_resolution.perceptual=nan: give a finite number",
        ),
        ({"start": "shapes"}, "is of another config.network"),
    ],
    ids=str,
)
def test_bad_config_is_refused_before_anything_is_written(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        AutoencoderTraining(load(config, **changes), str(tmp_path / "run")).run()
    assert not (tmp_path / "run").exists()
