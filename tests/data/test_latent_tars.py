"""Tars of latents and text features as SANA's own code stores them."""

import io
import pickle

import numpy as np
import pytest

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import BadImage
from sana_jax.data.latent_tars import LatentTars, first_rms
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.sources import is_stored, open_source
from sana_jax.data.text_image import CaptionEmbeddings, TextImageTransform
from sana_jax.data.transforms import StoredLatents
from sana_jax.runtime.errors import UserError
from tests.data.test_folder import PNG
from tests.data.test_webdataset import cache, tar  # noqa: F401

ROWS, WIDTH = 5, 6


def saved(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def npy(*shape, kind=np.float16, seed=0):
    return saved(np.random.default_rng(seed).standard_normal(shape).astype(kind))


def npz(shown, lead=(1,), **more):
    content, rng = io.BytesIO(), np.random.default_rng(shown)
    features = rng.standard_normal((*lead, ROWS, WIDTH)).astype(np.float32)
    mask = (np.arange(ROWS) < shown).astype(np.int16).reshape(*lead, ROWS)
    np.savez(content, **({"caption_feature": features, "attention_mask": mask} | more))
    return content.getvalue()


def members(count, features=True):
    found = {}
    for i in range(count):
        found[f"{i}__npy"] = npy(4, 2 + i % 2, 3, seed=i)
        found[f"{i}__json"] = {"prompt": f"a cat {i}", "height": 64, "width": 96}
        if features:
            found[f"{i}__npz"] = npz(1 + i % ROWS, lead=((), (1,))[i % 2])
    return found


def test_latents_and_features_are_those_of_the_files(tmp_path):
    path = tar(tmp_path / "x.tar", **members(6), a__png=PNG)
    source = open_source(f"latents:{path}")
    assert is_stored(f"latents:{path}") and (len(source), source.channels) == (6, 4)
    assert source.rows == ROWS and source.shapes.tolist() == [[2, 3], [3, 3]] * 3
    for i in range(6):
        record, expected = source[i], np.load(io.BytesIO(npy(4, 2 + i % 2, 3, seed=i)))
        np.testing.assert_array_equal(record["latents"], np.moveaxis(expected, 0, -1))
        assert record["latents"].dtype == np.float32
        assert (record["key"], record["captions"]) == (f"x.tar/{i}.npy", [f"a cat {i}"])
        features = np.load(io.BytesIO(npz(1 + i % ROWS)))["caption_feature"][0]
        (rows,) = record["embeddings"]
        np.testing.assert_array_equal(rows, features[: 1 + i % ROWS])
    assert 0.7 < first_rms(source) < 1.3


def test_batches_have_one_shape_each(tmp_path):
    source = open_source(f"latents:{tar(tmp_path / 'x.tar', **members(8))}")
    transform = TextImageTransform(StoredLatents(), CaptionEmbeddings(ROWS), CaptionChoice())
    loader = TrainingLoader(source, transform, batch_size=2, order=bucket_order(source, (), 2))
    shapes = {loader.batch(step)["latents"].shape for step in range(8)}
    assert shapes == {(2, 2, 3, 4), (2, 3, 3, 4)}
    assert loader.batch(0)["embeddings"].shape == (2, ROWS, WIDTH)


def test_without_features_captions_are_all_kept(tmp_path):
    found = members(2, features=False) | {"0__json": {"captions": ["a", "b"]}}
    source = LatentTars(str(tar(tmp_path / "x.tar", **found)))
    assert source.rows is None and source[0]["captions"] == ["a", "b"]
    assert "embeddings" not in source[0]


def test_the_fingerprint_follows_the_content(tmp_path):
    prints = []
    for seed in 0, 0, 1:
        path = tar(tmp_path / f"{len(prints)}/x.tar", a__npy=npy(4, 2, 3, seed=seed))
        prints.append(LatentTars(str(path)).fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"1__npy": b"no array"}, "x.tar/1.npy is no array of .channels, height, width"),
        ({"1__npy": npy(2, 3)}, "x.tar/1.npy is no array of"),
        ({"1__npy": npy(4, 3, 3).replace(b"3)", b"3 ")}, "x.tar/1.npy is no array of"),
        ({"1__npy": npy(4)}, "x.tar/1.npy is no array of"),
        ({"1__npy": npy(2, 4, 2, 3)}, "x.tar/1.npy is no array of"),
        ({"1__npy": npy(8, 2, 3)}, "x.tar/1.npy has other channels than the first, 4"),
        ({"2__npy": npy(4, 2, 3)}, "x.tar/2.npy has no text features beside it, others have"),
        ({"0__npz": b"PK"}, "x.tar/0.npy: bad_latents: text features"),
        ({"0__npz": npy(ROWS, WIDTH)}, "x.tar/0.npy: bad_latents: text features"),
        ({"0__npz": npz(2, caption_feature=np.ones(3))}, "x.tar/0.npy: bad_latents: text features"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        LatentTars(str(tar(tmp_path / "x.tar", **(members(2) | changes))))


@pytest.mark.parametrize(
    "changes",
    [
        {"1__npy": npy(4, 3, 3)[:-7]},
        {"1__npy": npy(4, 3, 3, kind=object)},
        {"1__npy": saved(np.full((4, 3, 3), "cat"))},
        {"1__npz": npz(0)},
        {"1__npz": npz(2, caption_feature=np.full((ROWS, WIDTH), "cat"))},
        {"1__npz": npz(2, attention_mask=np.ones(3))},
        {"1__npz": npz(2, caption_feature=np.full((ROWS, WIDTH), np.nan))},
        {"1__npz": pickle.dumps([1])},
    ],
)
def test_a_record_that_is_damaged_is_named(tmp_path, changes):
    source = LatentTars(str(tar(tmp_path / "x.tar", **(members(2) | changes))))
    assert source[0]["captions"] == ["a cat 0"]
    with pytest.raises(BadImage, match="^bad_latents") as caught:
        source[1]
    assert caught.value.key == "x.tar/1.npy"
