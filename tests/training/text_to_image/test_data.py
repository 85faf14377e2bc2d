"""The data fits the networks and the config, or is refused before anything is written."""

import io
import re

import jax
import numpy as np
import pytest

from sana_jax.checkpoints import native
from sana_jax.data import sizes
from sana_jax.data.precomputed import weights_sha256
from sana_jax.models import buckets
from sana_jax.runtime.errors import DoNotRetry, Retry, UserError
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.data import formats
from tests.data.test_webdataset import tar
from tests.training.text_to_image.toy import load, store, stored


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(recipe__batch_size=24), "batch_size=24: the data has 16 records"),
        (dict(data__flip=True), "flip=True: crop='centre'"),
        (dict(data__max_pixels=0), "config.data.max_pixels=0: give 1 to"),
        (dict(data__max_pixels=10**9), "config.data.max_pixels=1000000000: give 1 to"),
        (dict(data__source="nowhere"), "nowhere: there is no such folder"),
        (dict(data__captions__kind="best"), "config.data.captions.kind='best'"),
        (
            dict(mesh__fsdp=1, mesh__sequence=8),
            "config.mesh.sequence=8: images 16 pixels high have 4 rows of tokens",
        ),
        (
            dict(data__source="shapes", data__captions__kind="best"),
            "config.data.captions.kind='best'",
        ),
        (dict(data__source="shapes", data__crop="middle"), "crop='middle'"),
        (dict(data__source="shapes", data__shapes__train=4), "config.data.shapes.train=4: a batch"),
        (
            dict(data__source="shapes", loop__evaluate_every=1, data__test_split="validation"),
            "shapes has no split 'validation'",
        ),
        (dict(loop__evaluate_every=1, data__test_split="validation"), "no split 'validation'"),
    ],
    ids=str,
)
def test_data_that_does_not_fit_is_refused_before_anything_is_written(
    config, tmp_path, changes, message
):
    with pytest.raises(UserError, match=re.escape(message)):
        TextToImageTraining(load(config, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_data_that_is_away_when_a_run_comes_back_is_worth_a_retry(config, tmp_path):
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(Retry, match="nowhere: there is no such folder.*it was there before"):
        TextToImageTraining(load(config, data__source="nowhere"), str(tmp_path / "run"))
    # A split that is only now asked for was never there.
    changes = dict(loop__evaluate_every=1, data__test_split="fold_2")
    with pytest.raises(UserError, match="no split 'fold_2'"):
        TextToImageTraining(load(config, **changes), str(tmp_path / "run"))


def test_the_limit_of_pixels_is_the_configs(config, tmp_path, monkeypatch):
    given = dict(data__max_pixels=24 * 20)
    whole = TextToImageTraining(load(config, **given), str(tmp_path / "run")).loader
    assert whole.load(0)[1] == []
    less = TextToImageTraining(load(config, data__max_pixels=479), str(tmp_path / "run")).loader
    with pytest.raises(
        DoNotRetry, match="no usable record .*too_many_pixels: 24 x 20 are above 479"
    ):
        less.load(0)
    monkeypatch.setattr(buckets, "training_buckets", lambda size: ((16, 16), (8, 32)))
    with pytest.raises(UserError, match="no bucket of images holds a batch; the largest has 0"):
        buckets_of = dict(data__buckets=True, data__upscale=True, data__max_pixels=479)
        TextToImageTraining(load(config, **buckets_of), str(tmp_path / "run"))


def test_held_out_batches_do_not_follow_the_run(config, tmp_path):
    """Runs of other seeds, batches and captions are measured on the same pictures and captions."""
    changes = dict(loop__evaluate_every=1)
    first = TextToImageTraining(load(config, **changes), str(tmp_path / "a"))
    changes |= dict(seed=5, recipe__batch_size=16, data__captions__kind="uniform")
    second = TextToImageTraining(load(config, **changes), str(tmp_path / "b"))
    batches = [run.held_out[0].batch(0) for run in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert len(jax.tree.leaves(batches[0])[0]) == 8
    one, other = (np.asarray(run.loader.batch(0)["image"])[:8] for run in (first, second))
    assert not np.array_equal(one, other)


def test_sizes_of_images_are_read_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(buckets, "training_buckets", lambda size: ((16, 16), (8, 32)))
    changes = dict(data__buckets=True, data__upscale=True, loop__evaluate_every=1)
    first = TextToImageTraining(load(config, **changes), str(tmp_path / "run"))
    assert first.loader.batch(0)["image"].shape == (8, 16, 16, 3)
    monkeypatch.setattr(sizes, "size_of", None)
    again = TextToImageTraining(load(config, **changes), str(tmp_path / "run"))
    assert again.loader.fingerprint == first.loader.fingerprint


def test_stored_latents_must_be_of_the_config(config, tmp_path):
    store(tmp_path, config, "train", [(4, 4)])
    batch = stored(tmp_path, config).loader.batch(0)
    assert {name: rows.shape for name, rows in batch.items()} == {
        "latents": (8, 4, 4, 8),
        "tokens": (8, 8),
        "mask": (8, 8),
    }
    for changes, message in (
        (dict(data__size=32), "has latents of 16 x 16 pixels, config.data.size is 32"),
        (dict(data__flip=True), "stored latents stay as they are"),
        (dict(data__crop="random"), "stored latents stay as they are"),
        (dict(network__patch_size=3, data__size=36, data__buckets=True), "patches of 3 do not"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            stored(tmp_path, config, **changes)
    store(tmp_path, config, "train", [(4, 4), (3, 4)])
    with pytest.raises(UserError, match="has latents of 12 x 16 pixels, config.data.size is 16"):
        stored(tmp_path, config)
    mesh = dict(mesh__fsdp=4, mesh__sequence=2)
    with pytest.raises(UserError, match="config.mesh.sequence=2: images 12 pixels high have 3"):
        stored(tmp_path, config, data__buckets=True, **mesh)
    store(tmp_path, config, "train", [(4, 4)], autoencoder="another")
    with pytest.raises(UserError, match="is not of config.autoencoder="):
        stored(tmp_path, config)
    assert not (tmp_path / "run").exists()


def test_stored_embeddings_must_be_of_the_text_encoder(config, tmp_path):
    store(tmp_path, config, "train", [(4, 4)])
    told = stored(tmp_path, config).captions.settings
    base = native.open_folder(config.parent / "base")
    encoder = weights_sha256(base.text_encoder, base.params["text_encoder"])
    store(tmp_path, config, "train", [(4, 4)], text=told, text_encoder=encoder)
    batch = stored(tmp_path, config).loader.batch(0)
    assert batch["embeddings"].shape == (8, 8, 48)
    reads = dict(
        lora__rank=2, lora__targets=("text_encoder/.*",), network__sample_size=16, data__size=16
    )
    reads |= dict(start=str(config.parent / "base"), network__head_dim=32)
    with pytest.raises(UserError, match="embeddings, which a text encoder that trains cannot use"):
        stored(tmp_path, config, **reads)
    with pytest.raises(UserError, match="embeddings, which a text encoder that trains cannot use"):
        network = vars(base.text_encoder).items()
        train = {f"text_encoder__network__{name}": value for name, value in network}
        train |= dict(text_encoder__train=True, text_encoder__instruction=False)
        stored(tmp_path, config, **train)
    store(tmp_path, config, "train", [(4, 4)], text=told, text_encoder="another")
    with pytest.raises(UserError, match="not of config.text_encoder.checkpoint="):
        stored(tmp_path, config)
    store(tmp_path, config, "train", [(4, 4)], text=told | {"rows": 9}, text_encoder=encoder)
    with pytest.raises(UserError, match="another tokenizer, instruction or number of rows"):
        stored(tmp_path, config)


def test_latents_in_tars_must_fit_and_are_told_if_they_are_not_scaled(config, tmp_path, caplog):
    def training(scale=1, channels=8, rows=8, **changes):
        rng, found = np.random.default_rng(0), {}
        for i in range(8):
            latents, features = io.BytesIO(), io.BytesIO()
            np.save(latents, scale * rng.standard_normal((channels, 4, 4)))
            np.savez(features, caption_feature=rng.standard_normal((1, rows, 48)))
            found |= {f"{i}__npy": latents.getvalue(), f"{i}__npz": features.getvalue()}
            found[f"{i}__json"] = {"prompt": "a cat"}
        path = tar(tmp_path / "x.tar", **found)
        changes |= dict(data__source=f"latents:{path}", loop__evaluate_every=0)
        return TextToImageTraining(load(config, **changes), str(tmp_path / "run"))

    batch = training().loader.batch(0)
    assert batch["latents"].shape == (8, 4, 4, 8) and batch["embeddings"].shape == (8, 8, 48)
    assert "root mean square" not in caplog.text
    training(scale=2.5)
    assert "the latents' root mean square is 2.5" in caplog.text
    for changes, message in (
        (dict(channels=4), "has latents of 4 channels, config.autoencoder 8"),
        (dict(rows=9), "has text features of 9 rows, not 8"),
        (dict(data__size=32), "has latents of 16 x 16 pixels, config.data.size is 32"),
        (dict(data__flip=True), "stored latents stay as they are"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            training(**changes)
    assert not (tmp_path / "run").exists()


def test_archives_of_the_same_pictures_are_the_same_batches_to_the_bit(config, tmp_path):
    """All that a step depends on: of a folder, of tars, of tars with an index, and of Parquet."""
    batches = {}
    for kind, name in formats.all_of_them(tmp_path, 40).items():
        changes = dict(data__source=name, data__upscale=True, data__crop="random", data__flip=True)
        changes |= dict(data__caption="a picture", loop__evaluate_every=0)
        training = TextToImageTraining(load(config, **changes), str(tmp_path / kind / "run"))
        batches[kind] = [training.loader.batch(step) for step in range(3)]
    for found in batches.values():
        jax.tree.map(np.testing.assert_array_equal, found, batches["folder"])
