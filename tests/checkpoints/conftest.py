"""Folders of diffusers for the tests of one file."""

import shutil

import pytest

from tests import toy


@pytest.fixture(scope="module")
def theirs():
    return toy.pipeline(qk_norm="rms_norm_across_heads")


@pytest.fixture(scope="module")
def written(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(written, tmp_path / "checkpoint")
