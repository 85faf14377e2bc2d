"""Facts in words: every stated fact is said, and nothing else."""

import numpy as np
import pytest

from sana_jax.shapes import language

FACTS = {
    "count": 2,
    "objects": [
        {"shape": "ring", "colour": "red", "size": "small", "position": "top left"},
        {"shape": "star", "colour": "orange"},
    ],
    "relations": [[0, "left of", 1]],
}
LANGUAGES = [language.short, language.long, language.reordered, language.telegram]


@pytest.mark.parametrize("words", LANGUAGES)
def test_all_that_is_stated_is_said_in_lower_case(words):
    for seed in range(20):
        text = words(FACTS, np.random.default_rng(seed))
        assert text == text.lower()
        assert all(word in text for word in ("ring", "red", "small", "star", "orange"))
        assert "large" not in text and "above" not in text


def test_a_telegram_has_one_form():
    text = language.telegram(FACTS, np.random.default_rng(0))
    assert text == "small red ring top left, orange star; red ring left of orange star"


@pytest.mark.parametrize("words", LANGUAGES)
def test_the_same_chance_chooses_the_same_words(words):
    texts = [words(FACTS, np.random.default_rng(7)) for _ in range(2)]
    assert texts[0] == texts[1]
