"""The config of the trainings that these tests run."""

import pytest

from tests.training.autoencoder.toy import prepare


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("photos"))
