"""Caption choice against the formulas, written out."""

import json
import math

import numpy as np
import pytest

from sana_jax.data.captions import KINDS, CaptionChoice
from sana_jax.data.images import BadImage
from sana_jax.runtime.errors import UserError
from sana_jax.shapes.builder import record as shapes_record

SCORES = [27.1, 31.5, 24.9, 25.0]


def record(captions=("a", "b", "c", "d"), scores=SCORES, truth=""):
    return {"key": "k", "captions": list(captions), "scores": list(scores), "truth": truth}


def normalised(weights):
    return np.array(weights) / math.fsum(weights)


def test_score_is_the_reference_codes_formula():
    for tau in (0.1, 0.5, 1.0):
        found = CaptionChoice("score", temperature=tau).probabilities(record())
        expected = normalised([27.1 ** (1 / tau), 31.5 ** (1 / tau), 0, 25.0 ** (1 / tau)])
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    # The temperature is at least 0.01.
    coldest = [CaptionChoice("score", tau).probabilities(record()) for tau in (0.01, 1e-9)]
    np.testing.assert_array_equal(*coldest)
    np.testing.assert_allclose(coldest[0][0] / coldest[0][1], (27.1 / 31.5) ** 100, rtol=1e-9)


def test_no_score_above_the_threshold_takes_the_best():
    choice = CaptionChoice("score", threshold=40)
    assert choice.probabilities(record()).tolist() == [0, 1, 0, 0]
    zeros = CaptionChoice("score", threshold=0).probabilities(record(scores=[0, 0, 0, 0]))
    assert zeros.tolist() == [1, 0, 0, 0]
    negative = CaptionChoice("score", threshold=0).probabilities(record(scores=[-3, -1, -2, -9]))
    assert negative.tolist() == [0, 1, 0, 0]


def test_softmax_is_the_papers_formula():
    for tau in (0.1, 1.0, 10.0):
        found = CaptionChoice("softmax", temperature=tau).probabilities(record())
        expected = normalised([math.exp((c - 31.5) / tau) for c in SCORES])
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["score", "softmax"])
def test_cosines_are_points_over_a_hundred(kind):
    """The same threshold and temperature mean the same for data of both kinds."""
    points = CaptionChoice(kind, temperature=0.7).probabilities(record())
    cosines = CaptionChoice(kind, temperature=0.7, full_score=1.0)
    found = cosines.probabilities(record(scores=[c / 100 for c in SCORES]))
    np.testing.assert_allclose(found, points, rtol=1e-9)
    with pytest.raises(BadImage, match="bad_caption: scores .*full_score=1.0"):
        cosines.probabilities(record())


def test_what_is_drawn_has_these_probabilities():
    choice, rng = CaptionChoice("softmax", temperature=3.0), np.random.default_rng(0)
    drawn = np.bincount([choice(record(), rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, choice.probabilities(record()), atol=0.03)
    again = [choice(record(), np.random.default_rng((1, i))) for i in range(20)]
    assert again == [choice(record(), np.random.default_rng((1, i))) for i in range(20)]
    assert len(set(again)) > 1


def test_first_and_uniform_leave_empty_captions_out():
    captions = record(["", "b", " ", "d"], [])
    assert CaptionChoice().probabilities(captions).tolist() == [0, 1, 0, 0]
    assert CaptionChoice("uniform").probabilities(captions).tolist() == [0, 0.5, 0, 0.5]
    scored = record(["a", "", "c", "d"])  # the empty one has the best score
    for kind in ("score", "softmax"):
        found = CaptionChoice(kind, temperature=1.0).probabilities(scored)
        assert found[1] == 0 and found.argmax() == 0


def test_proportions_by_number_and_by_style():
    by_number = CaptionChoice("proportion", proportions={0: 3, "2": 1, 9: 5})
    assert by_number.probabilities(record()).tolist() == [0.75, 0, 0.25, 0]
    styles = CaptionChoice("proportion", proportions={"noisy": 0.1, "long": 0.3})
    found = styles.probabilities(shapes_record((0, 1), "train", 16, 16))
    np.testing.assert_allclose(found, [0, 0.75, 0, 0.25])
    with pytest.raises(BadImage, match="has a part in the proportions"):
        styles.probabilities(record())
    for truth in ("{", "[]", '{"captions": [1]}', "null"):
        assert by_number.probabilities(record(truth=truth))[0] == 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_item_28_missing_captions_are_rejected_with_a_reason(kind):
    choice = CaptionChoice(kind, proportions={0: 1})
    for captions in ([], [""], [" ", "\n"]):
        with pytest.raises(BadImage) as caught:
            choice(record(captions, [1.0] * len(captions)), np.random.default_rng(0))
        assert caught.value.reason == "bad_caption"


@pytest.mark.parametrize("kind", ["score", "softmax"])
def test_captions_without_scores(kind):
    choice = CaptionChoice(kind)
    assert choice.probabilities(record(["a"], [])).tolist() == [1]  # nothing to choose
    with pytest.raises(BadImage, match="0 scores for 2 captions"):
        choice.probabilities(record(["a", "b"], []))
    with pytest.raises(BadImage, match="nan"):
        choice.probabilities(record(["a", "b"], [1.0, math.nan]))


def test_scores_of_shapes_are_points():
    """The default threshold leaves some of them out, and keeps the best."""
    choice = CaptionChoice("score")
    kept = []
    for i in range(50):
        made = shapes_record((0, i), "train", 16, 16)
        found = choice.probabilities(made)
        assert found[np.argmax(made["scores"])] == found.max()
        kept.append((found > 0).mean())
    assert 0.2 < np.mean(kept) < 0.95


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(kind="best"), "kind='best': it takes first, uniform"),
        (dict(kind="score", temperature=0), "temperature=0"),
        (dict(kind="score", full_score=-1), "full_score=-1"),
        (dict(kind="proportion"), "proportions={}"),
        (dict(kind="proportion", proportions={"a": -1, "b": 2}), "proportions="),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(UserError, match=words):
        CaptionChoice(**options)


def test_settings_are_what_decides():
    choices = [
        CaptionChoice(),
        CaptionChoice("uniform"),
        CaptionChoice("score"),
        CaptionChoice("score", threshold=20),
        CaptionChoice("softmax"),
        CaptionChoice("softmax", full_score=1.0),
        CaptionChoice("proportion", proportions={0: 1.0}),
        CaptionChoice("proportion", proportions={"short": 1.0}),
    ]
    prints = [json.dumps(choice.settings) for choice in choices]
    assert len(set(prints)) == len(choices)
    assert [json.loads(text) for text in prints] == [choice.settings for choice in choices]
    assert CaptionChoice("softmax", threshold=3).settings == CaptionChoice("softmax").settings


def test_pictures_without_a_good_caption_are_dropped():
    """The best of SCORES has 31.5 points: the limit itself is good enough."""
    for kind in ("first", "score", "softmax"):
        choice = CaptionChoice(kind, temperature=1.0, drop_below=31.5)
        kept = CaptionChoice(kind, temperature=1.0)
        expected = kept.probabilities(record())
        np.testing.assert_array_equal(choice.probabilities(record()), expected)
        with pytest.raises(BadImage, match="low_score: its best caption has 31.50 points"):
            CaptionChoice(kind, drop_below=31.6).probabilities(record())
    cosines = CaptionChoice(full_score=1.0, drop_below=22)
    with pytest.raises(BadImage, match="has 21.90 points"):
        cosines.probabilities(record(["a"], [0.219]))
    assert cosines.probabilities(record(["a"], [0.22])).tolist() == [1]
    with pytest.raises(BadImage, match="has 21.00 points"):  # the empty one does not count
        CaptionChoice(drop_below=22).probabilities(record(["a", ""], [21, 30]))
    with pytest.raises(BadImage, match="0 scores for 1 captions; choose by another .* drop_below"):
        CaptionChoice(drop_below=22).probabilities(record(["a"], []))
    with pytest.raises(UserError, match="drop_below=101: give 0 to 100 points"):
        CaptionChoice(drop_below=101)


def test_what_is_dropped_decides_a_run_and_nothing_else_does():
    assert CaptionChoice("first").settings == {"kind": "first"}
    dropping = {"kind": "first", "full_score": 100.0, "drop_below": 22}
    assert CaptionChoice("first", drop_below=22).settings == dropping
    used = CaptionChoice("score", drop_below=22).settings
    assert set(used) == {"kind", "temperature", "threshold", "full_score", "drop_below"}
