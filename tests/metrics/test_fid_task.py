"""evaluate --task=fid against the reference packages: same pictures, same random weights."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from sana_jax.data.rejections import Counts
from sana_jax.metrics import features, fid_task, frechet
from sana_jax.metrics.fid_task import Options, fid
from sana_jax.runtime.errors import UserError
from tests import references

COUNTS = {"data": 7, "reference": 6}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Random weights, and two folders of pictures."""
    path = tmp_path_factory.mktemp("fid")
    torch.save(references.inception_weights(2), path / "weights.pth")
    for name, count in COUNTS.items():
        (path / name).mkdir()
        rng = np.random.default_rng(count)
        for i in range(count):
            coarse = rng.integers(0, 256, (rng.integers(2, 9), rng.integers(2, 9), 3))
            image = Image.fromarray(coarse.astype(np.uint8))
            image.resize((96, 80), Image.Resampling.BICUBIC).save(path / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def options(shared):
    return Options(
        data=str(shared / "data"),
        reference=str(shared / "reference"),
        weights=str(shared / "weights.pth"),
        batch_size=8,
        workdir=str(shared / "features"),
    )


@pytest.fixture(scope="module")
def theirs(shared):
    """What pytorch-fid and clean-fid extract from the two folders, by the resize."""
    network = references.pytorch_fid_inception(shared / "weights.pth")
    # That of clean-fid is a TorchScript of the same layers, on pixels already resized and scaled.
    plain = references.pytorch_fid_inception(
        shared / "weights.pth", resize_input=False, normalize_input=False
    )
    found = {}
    for name in COUNTS:
        files = sorted((shared / name).iterdir())
        extract = references.pytorch_fid.get_activations
        found["bilinear", name] = extract(files, network, batch_size=8, num_workers=0)
        found["bicubic", name] = references.clean_fid.get_folder_features(
            str(shared / name),
            lambda x: plain((x - 128) / 128)[0].flatten(1),
            num_workers=0,
            device=torch.device("cpu"),
            verbose=False,
        )
    return found


def statistics(x):
    return frechet.statistics(lambda: [x])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_figures_are_those_of_the_references_features(options, theirs, resize):
    found = fid(dataclasses.replace(options, resize=resize))
    x, y = (theirs[resize, name].astype(np.float64) for name in COUNTS)
    expected = frechet.frechet_distance(statistics(x), statistics(y))
    print(f"{resize}: FID {found['fid']:.6f}, theirs {expected:.6f}")
    assert found["fid"] == pytest.approx(expected, rel=1e-3) and expected > 1
    tensors = [torch.from_numpy(z) for z in (x, y)]
    kid = references.metric_kid.kid_features_to_metric(*tensors, kid_subset_size=6, verbose=False)
    mean = kid[references.metric_kid.KEY_METRIC_KID_MEAN]
    print(f"{resize}: KID {found['kid']:.6f}, theirs {mean:.6f}")
    assert found["kid"] == pytest.approx(mean, rel=1e-2)
    shares = references.metric_prc.prc_features_to_metric(*tensors, verbose=False)
    assert [found["precision"], found["recall"]] == pytest.approx(
        [shares["precision"], shares["recall"]], abs=1e-6
    )
    assert (found["resize"], found["count"], found["reference_count"]) == (resize, 7, 6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_is_that_of_pytorch_fids_command(options, theirs):
    """Its square root of a 2048 x 2048 matrix takes a minute."""
    x, y = (theirs["bilinear", name] for name in COUNTS)
    mine, other = ((z.mean(axis=0), np.cov(z, rowvar=False)) for z in (x, y))
    expected = references.pytorch_fid.calculate_frechet_distance(*mine, *other)
    assert fid(options)["fid"] == pytest.approx(expected, rel=1e-3)


def test_statistics_stand_for_their_folder(options, shared):
    """And the features of a run before are read again: its network is not called."""
    path = shared / "reference.npz"
    whole = fid(options)
    assert "FID" in fid_task.table(whole)
    written = dataclasses.replace(options, data=options.reference, reference=None)
    found = fid(dataclasses.replace(written, statistics=str(path)))
    assert found["fid"] is None and found["count"] == 6
    again = fid(dataclasses.replace(options, reference=str(path)))
    assert again["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    assert again["kid"] is None and again["precision"] is None
    assert "reference_count" not in again
    assert frechet.read_statistics(path, 2048).mean.shape == (2048,)


def test_what_cannot_be_compared_is_one_line(options, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "measure", None)  # nothing is measured before
    for changes, words in (
        (dict(reference=str(shared / "none.npz")), "none.npz is missing"),
        (dict(reference=str(shared / "none")), "--reference=.* no such folder"),
        (dict(data=str(tmp_path)), "no image in it"),
        (dict(weights=str(shared / "none.pth")), "none.pth is missing"),
        (dict(weights=str(shared)), "is a folder, where a file is needed"),
    ):
        with pytest.raises(UserError, match=words) as error:
            fid(dataclasses.replace(options, **changes))
        assert "\n" not in str(error.value)


def test_one_picture_has_no_spread(options, monkeypatch):
    monkeypatch.setattr(features, "measure", lambda *_, **__: features.Features([], Counts(1, 1)))
    with pytest.raises(UserError, match="two pictures or more"):
        fid(options)
