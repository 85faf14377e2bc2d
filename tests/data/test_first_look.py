"""A bad picture among few is told before a training starts, with the remedy."""

import re

import pytest

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.first_look import check_first, first_captions
from sana_jax.data.images import BadImage
from sana_jax.data.sources import open_source
from sana_jax.data.text_image import TextImageTransform
from sana_jax.data.transforms import ImageTransform
from sana_jax.runtime.errors import UserError
from tests.data.bad_files import encode, picture
from tests.data.test_folder import PNG, make


class Words:
    settings = None

    def __call__(self, record, caption):
        return {"words": record["captions"][caption]}


def look(folder, count=10, **image):
    transform = TextImageTransform(ImageTransform(32, 32, **image), Words(), CaptionChoice())
    check_first(open_source(str(folder)), transform, count, threads=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b.png": PNG[:60]}, "b.png cannot be used: truncated: "),
        ({"b.png": b"<html>", "c.png": b""}, "; and 1 more of 3; repair it, or take it away"),
        (
            {"b.txt": " "},
            "b.png cannot be used: bad_caption: it has no caption; give config.data.ca",
        ),
        ({"b.png": encode(picture()[:20, :20], "PNG")}, "or config.data.upscale=True to enlarge"),
        ({"b.json": "{"}, "b.png cannot be used: bad_caption: b.json: no JSON"),
    ],
    ids=str,
)
def test_a_bad_picture_is_refused_with_its_name_and_the_remedy(tmp_path, changes, message):
    files = {
        f"{stem}{ending}": text
        for stem in "abc"
        for ending, text in {".png": PNG, ".txt": "a"}.items()
    }
    look(make(tmp_path, files))
    make(tmp_path, changes)
    with pytest.raises(UserError, match=re.escape(message)):
        look(tmp_path)
    look(tmp_path, count=1)  # no more than it was told to


def test_first_captions_are_those_of_pictures_that_can_be_read():
    class Source(list):
        fingerprint = ""

        def __getitem__(self, index):
            text = super().__getitem__(index)
            if text is None:
                raise BadImage("unreadable")
            return {"captions": text.split("|") if text else []}

    source = Source(["a|x", None, "a", "", "b", "c", "d"])
    assert first_captions(source, 3) == ("a", "b", "c")
    assert first_captions(source, 9) == ("a", "b", "c", "d")
    assert first_captions(source, 9, records=4) == ("a",)
