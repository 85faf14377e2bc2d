"""Inception-v3 at full size against torch-fidelity's and pytorch-fid's, with random weights."""

import jax
import numpy as np
import pytest
import torch

from sana_jax.checkpoints import inception as checkpoint
from sana_jax.models import inception
from tests import references
from tests.toy import assert_close


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(references.inception_weights(), path)
    return path


@pytest.fixture(scope="module")
def apply(weights):
    params = checkpoint.load(weights)
    module = jax.jit(inception.InceptionV3().apply)
    return lambda x: np.asarray(module({"params": params}, x))


def pictures(count):
    """Pictures that differ in colour, contrast and scale, uint8."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (1, side, side, 3)) for side in (2, 5, 13)[:count]]
    return np.concatenate(
        [
            x.repeat(299 // x.shape[1] + 1, 1).repeat(299 // x.shape[2] + 1, 2)[:, :299, :299]
            for x in coarse
        ]
    ).astype(np.uint8)


def test_features_are_those_of_torch_fidelity_and_pytorch_fid(apply, weights):
    x = pictures(3)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        fidelity = references.fidelity_inception(weights)(planes)[0].numpy()
        pytorch = references.pytorch_fid_inception(weights)(planes.float() / 255)[0][..., 0, 0]
    # The two differ in the scale of the pixels, so the second sees other numbers.
    assert fidelity.std(axis=0).mean() > 0.03 * fidelity.std(), "the pictures look alike to it"
    assert_close(apply((x.astype(np.float32) - 128) / 128), fidelity, 1e-5, "torch-fidelity")
    scaled = 2 * (x.astype(np.float32) / 255) - 1
    assert_close(apply(scaled), pytorch.numpy(), 1e-5, "pytorch-fid")


def test_pools_leave_padding_out():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (2, 7, 6, 3)).astype(np.float32)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2)
    functional = torch.nn.functional
    mean = functional.avg_pool2d(planes, 3, 1, 1, count_include_pad=False)
    largest = functional.max_pool2d(planes, 3, 1, 1)
    shrunk = functional.max_pool2d(planes, 3, 2)
    for found, expected in (
        (inception._mean_pool(x), mean),
        (inception._max_pool(x, 1), largest),
        (inception._max_pool(x), shrunk),
    ):
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=1e-6)
