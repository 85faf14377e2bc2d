"""Captions of a template: which pictures get it, and what stands for its fields."""

import re

import pytest

from sana_jax.data.caption_template import Captioned, CaptionTemplate
from sana_jax.data.images import BadImage
from sana_jax.data.sources import open_source
from sana_jax.runtime.errors import UserError
from tests.data.test_folder import PNG, make

FILES = {
    "my_dog.png": PNG,
    "cats/a_cat.png": PNG,
    "cats/a_cat.txt": "a cat asleep\na cat",
    "dogs/old_ones/rex.png": PNG,
}


def captions(tmp_path, text: str) -> list[list[str]]:
    source = open_source(str(make(tmp_path / "my_pets", FILES)))
    captioned = Captioned(source, CaptionTemplate(text, "my_pets"))
    return [captioned[i]["captions"] for i in range(len(captioned))]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a photo of sks", ["a photo of sks"]),
        ("{name} of {folder}", ["rex of old ones"]),
        ("a {{brace}}", ["a {brace}"]),
    ],
)
def test_pictures_without_a_caption_get_the_text(tmp_path, text, expected):
    cat, rex, dog = captions(tmp_path, text)
    assert cat == ["a cat asleep", "a cat"]  # its own
    assert rex == expected
    assert dog == ([text] if text == "a photo of sks" else dog)


def test_pictures_beside_the_folders_are_of_the_whole_folder(tmp_path):
    assert captions(tmp_path, "{name} in {folder}")[2] == ["my dog in my pets"]


def test_a_template_with_caption_is_made_of_the_pictures_own(tmp_path):
    source = open_source(str(make(tmp_path, FILES)))
    captioned = Captioned(source, CaptionTemplate("{caption}, as sks in {folder}"))
    assert captioned[0]["captions"] == ["a cat asleep, as sks in cats", "a cat, as sks in cats"]
    with pytest.raises(BadImage, match="it has no caption of its own, for {caption}") as raised:
        captioned[1]
    assert raised.value.key == "dogs/old_ones/rex.png"


def test_scores_stay_with_the_captions_that_they_are_of():
    class One:
        fingerprint = "one"

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"key": "a.png", "captions": ["a cat"], "scores": [30.0], "truth": ""}

    for text, scores in (("{caption} now", [30.0]), ("a dog", [30.0])):
        assert Captioned(One(), CaptionTemplate(text))[0]["scores"] == scores


def test_the_fingerprint_is_of_the_files_and_the_text(tmp_path):
    source = open_source(str(make(tmp_path, FILES)))

    def fingerprint(*args):
        return Captioned(source, CaptionTemplate(*args)).fingerprint

    others = {fingerprint(text, "pets") for text in ("a dog", "a cat", "a {folder}")}
    assert len({*others, source.fingerprint, fingerprint("a {folder}", "moved")}) == 5
    assert fingerprint("a dog", "pets") == fingerprint("a dog", "moved")
    assert Captioned(source, CaptionTemplate("a dog")).places == source.places


@pytest.mark.parametrize(
    "text, message",
    [
        ("a {subject}", "{subject} is no field; there are {name}, {folder}, {caption}"),
        ("a {}", "{} is no field"),
        ("a {name.real}", "{name.real} is no field"),
        ("a {name!r}", "a field is its name alone, such as {name}"),
        ("a {name:>{folder}}", "a field is its name alone"),
        ("a {name", "config.data.caption='a {name': "),
        (" ", 'config.data.caption has no words; give config.data.caption="a photo of sks dog"'),
        ("a" * (2**20 + 1), "config.data.caption has 1048577 characters"),
    ],
)
def test_a_template_that_means_nothing_is_refused(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CaptionTemplate(text)
