"""The checkpoints that these tests read, damage and extend."""

import shutil

import pytest

from sana_jax.training.checkpoints.manager import Checkpoints
from tests.training.checkpoints.toy import CONFIG, DATA, make


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, CONFIG, DATA) as checkpoints:
        for step in 1, 2, 3:
            checkpoints.save(step, make(step), {"row": step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")
