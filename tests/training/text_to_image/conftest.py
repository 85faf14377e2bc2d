"""A tiny training, from its config to its end; tests read it, and copy it to change it."""

import pytest

from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.training.text_to_image.toy import load, prepare


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def unbroken(config, tmp_path_factory):
    """20 steps on eight devices."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    changes = dict(loop__images_every=20, loop__evaluate_every=20, peak_flops=1e12)
    TextToImageTraining(load(config, **changes), str(workdir)).run()
    return workdir
