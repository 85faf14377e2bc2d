"""KID against torch-fidelity and clean-fid, and CMMD against the formula of its reference."""

import numpy as np
import pytest
import torch

from sana_jax.metrics import kernel_distances
from sana_jax.metrics.kernel_distances import cmmd, kid
from tests import references


def features(seed, count, width=32, shift=0.0):
    return np.random.default_rng(seed).uniform(0, 1 + shift, (count, width)).astype(np.float32)


@pytest.mark.parametrize("counts, subset", [((90, 70), 50), ((50, 50), 50), ((40, 60), 1000)])
def test_kid_is_torch_fidelitys(monkeypatch, counts, subset):
    monkeypatch.setattr(kernel_distances, "SUBSET", subset)
    x, y = features(0, counts[0]), features(1, counts[1], shift=0.2)
    metric = references.metric_kid
    expected = metric.kid_features_to_metric(
        *(torch.from_numpy(z.astype(np.float64)) for z in (x, y)),
        kid_subset_size=min(subset, *counts),
        verbose=False,
    )
    mean, spread = kid(x, y)
    assert mean == pytest.approx(expected[metric.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert spread == pytest.approx(expected[metric.KEY_METRIC_KID_STD], rel=1e-5, abs=1e-10)


def test_kid_of_whole_sets_is_clean_fids():
    x, y = features(0, 60), features(1, 60, shift=0.2)
    expected = references.clean_fid.kernel_distance(x, y, num_subsets=2)
    assert kid(x, y)[0] == pytest.approx(expected, rel=1e-3)  # it sums in float32
    with pytest.raises(ValueError):
        kid(x[:1], y)


def test_cmmd_is_the_mean_over_all_pairs(monkeypatch):
    monkeypatch.setattr(kernel_distances, "BLOCK", 16)
    x, y = features(0, 50) - 0.5, features(1, 30) - 0.4
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a, b):
        squares = ((a[:, None].astype(np.float64) - b) ** 2).sum(-1)
        return np.exp(-squares / (2 * 10**2)).mean()

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-4)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
