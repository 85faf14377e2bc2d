"""Precision and recall against torch-fidelity's."""

import numpy as np
import pytest
import torch

from sana_jax.metrics import precision_recall as metric
from tests import references


def features(seed, count, width=8, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(count, width)) + shift).astype(np.float32)


@pytest.mark.parametrize("shift, scale", [(0.0, 0.5), (0.8, 1.0), (0.0, 1.6)])
def test_shares_are_torch_fidelitys(monkeypatch, shift, scale):
    monkeypatch.setattr(metric, "BLOCK", 32)
    generated, real = features(0, 90, scale=scale, shift=shift), features(1, 70)
    expected = references.metric_prc.prc_features_to_metric(
        *(torch.from_numpy(z.astype(np.float64)) for z in (generated, real)), verbose=False
    )
    precision, recall = metric.precision_recall(generated, real)
    assert precision == pytest.approx(expected["precision"], abs=1e-6)
    assert recall == pytest.approx(expected["recall"], abs=1e-6)
    assert 0 < min(precision, recall) < 1


def test_distances_far_from_zero_keep_their_digits():
    generated, real = features(0, 60, scale=0.8), features(1, 60)
    near = metric.precision_recall(generated, real)
    assert metric.precision_recall(generated + 1000, real + 1000) == pytest.approx(near, abs=0.05)


def test_a_set_covers_itself():
    x = features(0, 20)
    assert metric.precision_recall(x, x) == (1.0, 1.0)
    with pytest.raises(ValueError):
        metric.precision_recall(x, x[:3])
