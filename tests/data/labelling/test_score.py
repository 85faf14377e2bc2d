"""Scores of captions against transformers' CLIP, on meshes, and after a break."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sana_jax import sharding
from sana_jax.checkpoints.clip import open_clip
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.labelling import labels
from sana_jax.data.labelling.labels import source_settings
from sana_jax.data.labelling.score import Scorer
from sana_jax.data.sources import open_source
from sana_jax.runtime.errors import Retry, UserError
from tests import toy_clip
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make

CAPTIONS = [["a cat", "two red circles above a line"], ["e"], ["be ba bo " * 20, "a", "bi bu"]]
COUNT = 5


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A toy CLIP, its model, and five good pictures with captions among two others."""
    path = tmp_path_factory.mktemp("clip")
    (path / "clip").mkdir()
    model = toy_clip.save(path / "clip")
    files = {}
    for i in range(COUNT):
        files[f"{i}.png"] = encode(picture(i), "PNG")
        files[f"{i}.txt"] = "\n".join(CAPTIONS[i % 3])
    files |= {"bad.png": b"no picture", "bad.txt": "a", "without.png": files["0.png"]}
    make(path / "photos", files)
    return path, model


@pytest.fixture(scope="module")
def source(shared):
    return open_source(str(shared[0] / "photos"))


@pytest.fixture(scope="module")
def scorer(shared):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Scorer(open_clip(shared[0] / "clip"), mesh, batch_size=2)


def run(scorer, source, shared, out):
    out.mkdir(exist_ok=True)
    where = str(shared[0] / "photos"), "train", None, 128
    return scorer.run(source, out, source_settings(source, *where))


def expected(shared, i):
    """The scores of a picture by transformers, from its own processor and tokenizer."""
    path, model = shared
    with Image.open(path / "photos" / f"{i}.png") as image:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
        pixels = processor([image.convert("RGB")], return_tensors="pt")["pixel_values"]
    tokenizer = CLIPTokenizerFast.from_pretrained(path / "clip")
    texts = dict(padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        found = [
            model.get_image_features(pixels),
            model.get_text_features(**tokenizer(CAPTIONS[i % 3], **texts)),
        ]
    image, text = (getattr(x, "pooler_output", x).double() for x in found)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (image, text)]
    return 100 * (unit[1] @ unit[0][0]).numpy()


def test_scores_are_transformers(shared, source, scorer, tmp_path):
    index = run(scorer, source, shared, tmp_path)
    rejected = {reason: n for reason, n in index["counts"]["rejected"].items() if n}
    assert rejected == {"not_an_image": 1, "bad_caption": 1} and set(index["bad"]) == {
        "bad.png", "without.png"
    }  # fmt: skip
    scored = open_source(f"captioned:{tmp_path}")
    assert len(scored) == COUNT and index["scored_captions"] == 2 + 1 + 3 + 2 + 1
    spread, total = [], 0
    for i in range(COUNT):
        theirs, record = expected(shared, i), scored[i]
        assert record["key"] == f"{i}.png" and record["captions"] == [
            caption.strip() for caption in CAPTIONS[i % 3]
        ]
        np.testing.assert_allclose(record["scores"], theirs, atol=1e-4)
        spread.extend(theirs)
        total += sum(record["scores"])
    assert np.std(spread) > 1 and index["sum_of_scores"] == pytest.approx(total)
    best = CaptionChoice("score", threshold=0).probabilities(scored[0])
    assert best.argmax() == np.argmax(expected(shared, 0))


@pytest.mark.parametrize("fsdp", [1, 8])
def test_scores_on_a_mesh(shared, source, scorer, tmp_path, fsdp):
    run(scorer, source, shared, tmp_path / "one")
    mesh = sharding.make_mesh(fsdp=fsdp)
    run(Scorer(open_clip(shared[0] / "clip"), mesh, batch_size=2), source, shared, tmp_path / "all")
    one, many = (open_source(f"captioned:{tmp_path / name}") for name in ("one", "all"))
    for i in range(COUNT):
        np.testing.assert_allclose(many[i]["scores"], one[i]["scores"], atol=2e-5)


class Failing:
    """A source that fails at a record."""

    def __init__(self, source, at):
        self._source, self._at, self.fingerprint = source, at, source.fingerprint

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index == self._at:
            raise Retry("the disk is away")
        return self._source[index]


def test_a_run_that_was_stopped_goes_on(shared, source, scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "BLOCK", 3)
    run(scorer, source, shared, tmp_path / "whole")
    with pytest.raises(Retry):
        run(scorer, Failing(source, 4), shared, tmp_path / "out")
    assert len((tmp_path / "out" / "metadata.jsonl.part").read_bytes().splitlines()) == 3
    run(scorer, Failing(source, 1), shared, tmp_path / "out")  # which is not read again
    whole, out = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "out")
    )
    assert whole == out
    with pytest.raises(UserError, match=r"other settings \(clip\)"):
        run(
            Scorer(scorer._opened, scorer._mesh, batch_size=2, drop_below=1.0),
            source,
            shared,
            tmp_path / "out",
        )


def test_pictures_with_low_scores_are_left_out(shared, source, scorer, tmp_path):
    limits = sorted(max(expected(shared, i)) for i in range(COUNT))
    limit = (limits[-2] + limits[-1]) / 2
    assert limits[0] < 0 < limit
    picky = Scorer(scorer._opened, scorer._mesh, batch_size=2, drop_below=limit)
    picky._networks = scorer._networks  # which are compiled
    index = run(picky, source, shared, tmp_path)
    dropped = sum(best < limit for best in limits)
    assert index["counts"]["rejected"]["low_score"] == dropped == COUNT - 1
    assert len(open_source(f"captioned:{tmp_path}")) == COUNT - dropped


def test_weights_that_are_none_are_named(shared, source, scorer, tmp_path):
    broken = Scorer(scorer._opened, scorer._mesh, batch_size=2)
    broken._networks = {"image": lambda rows: np.full((2, 4), np.nan)}
    with pytest.raises(UserError, match="computes NaN or infinite features"):
        run(broken, source, shared, tmp_path)
