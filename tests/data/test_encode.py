"""What the encoder is given of a record; tests/test_precompute.py encodes whole data sets."""

import numpy as np
import pytest

from sana_jax.data.encode import WithTokens
from sana_jax.data.images import BadImage

RECORD = {"key": "a\ud800.png", "image": b"", "captions": ["x\ud800"], "scores": [], "truth": ""}


def image(record, rng):
    return {"image": np.zeros((4, 4, 3), np.uint8)}


def tokens(record, caption):
    return {"tokens": np.array([caption])}


def test_half_surrogates_are_not_stored():
    found = WithTokens(image)(RECORD, np.random.default_rng(0))
    assert found["record"]["key"] == "a\ufffd.png" and found["record"]["captions"] == ["x\ufffd"]
    assert found["captions"] == [] and found["image"].shape == (4, 4, 3)


def test_every_caption_gets_its_tokens():
    record = RECORD | {"captions": ["x", "y"]}
    found = WithTokens(image, tokens)(record, np.random.default_rng(0))
    assert [caption["tokens"].tolist() for caption in found["captions"]] == [[0], [1]]


def test_a_record_without_captions_is_rejected_where_they_are_encoded():
    record = RECORD | {"captions": []}
    with pytest.raises(BadImage, match="it has no caption"):
        WithTokens(image, tokens)(record, np.random.default_rng(0))
