"""FID's distance and statistics against pytorch-fid, clean-fid and torch-fidelity."""

import numpy as np
import pytest
import torch

from sana_jax.metrics import frechet
from sana_jax.runtime.errors import UserError
from tests import references


def features(seed, count, width=48, shift=0.0):
    """Correlated features, far from zero, as those of a network."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).normal(size=(width, width)) * 0.9 ** np.arange(width)
    return (rng.normal(size=(count, width)) @ mix.T + 10 + shift).astype(np.float32)


def statistics(x, block=7):
    return frechet.statistics(lambda: (x[i : i + block] for i in range(0, len(x), block)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("count", [300, 20])  # of 20, the covariances are singular
def test_distance_is_that_of_the_references(count):
    x, y = features(0, count), features(1, count + 10, shift=0.3)
    ours = frechet.frechet_distance(statistics(x), statistics(y))
    mine, theirs = ((z.mean(0, np.float64), np.cov(z.astype("f8"), rowvar=False)) for z in (x, y))
    expected = references.pytorch_fid.calculate_frechet_distance(*mine, *theirs)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert ours == pytest.approx(references.clean_fid.frechet_distance(*mine, *theirs), rel=1e-5)
    tensors = (torch.from_numpy(z.astype("f8")) for z in (x, y))
    stats = [references.metric_fid.fid_features_to_statistics(z) for z in tensors]
    found = references.metric_fid.fid_statistics_to_metric(*stats, verbose=False)
    assert ours == pytest.approx(found[references.metric_fid.KEY_METRIC_FID], rel=1e-5)


def test_statistics_are_numpys_and_blocks_do_not_matter():
    x = features(2, 50)
    found = statistics(x)
    np.testing.assert_allclose(found.mean, x.mean(0, np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype("f8"), rowvar=False), rtol=1e-10)
    assert frechet.frechet_distance(found, statistics(x, block=50)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="two pictures or more"):
        statistics(x[:1])


def test_files_are_those_of_pytorch_fid(tmp_path):
    found = statistics(features(3, 50))
    path = tmp_path / "statistics.npz"
    frechet.write_statistics(path, found)
    mean, covariance = references.pytorch_fid.compute_statistics_of_path(
        str(path), None, 50, 48, "cpu"
    )
    again = frechet.read_statistics(path, 48)
    for theirs, ours, written in zip((mean, covariance), again[:2], found[:2], strict=True):
        np.testing.assert_array_equal(theirs, written)
        np.testing.assert_array_equal(ours, written)
    assert again.root is None and found.root is None


def test_few_pictures_have_their_root():
    x, y = statistics(features(4, 20)), statistics(features(5, 48, shift=0.1))
    assert x.root.shape == (20, 48)
    np.testing.assert_allclose(x.covariance, np.cov(features(4, 20).astype("f8").T), rtol=1e-9)
    known = frechet.frechet_distance(x, y)
    assert frechet.frechet_distance(x._replace(root=None), y) == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize(
    "arrays, words",
    [
        (None, "is no .npz file of statistics"),
        ({"mu": np.zeros(4)}, "lacks mu or sigma"),
        ({"mu": np.zeros(4), "sigma": np.zeros((3, 3))}, r"sigma is float64 \[3, 3\], where"),
        ({"mu": np.array([np.nan] * 4), "sigma": np.zeros((4, 4))}, "finite"),
        ({"mu": np.array([{}] * 4), "sigma": np.zeros((4, 4))}, "is no .npz file of statistics"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, words):
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays) if arrays else path.write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=words) as error:
        frechet.read_statistics(path, 4)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is missing"):
        frechet.read_statistics(tmp_path / "none.npz", 4)
