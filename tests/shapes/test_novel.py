"""The colour that shapes does not have: pictures that teach it, prompts that ask for it."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sana_jax.data.folder import Folder
from sana_jax.runtime.errors import UserError
from sana_jax.shapes import novel
from sana_jax.shapes.draw import draw
from sana_jax.shapes.parse import _lab, parse
from sana_jax.shapes.scene import COLOURS, HELD_OUT, SHAPES, scene
from sana_jax.shapes.score import score

ASKED = novel.prompts(64)
TAUGHT = novel.prompts(novel.PICTURES, split="train")


def kinds(scene):
    return {(thing.shape, thing.colour) for thing in scene.objects}


def drawn(prompt):
    return draw(prompt.scene, 128, 128, novel.COLOURS)


def test_the_colour_is_as_far_from_the_others_as_they_are_from_one_another():
    labs = _lab(np.array(list(novel.COLOURS.values())))
    apart = np.linalg.norm(labs[:, None] - labs[None], axis=-1)
    of_old = apart[:-1, :-1][~np.eye(len(COLOURS), dtype=bool)]
    assert list(novel.COLOURS) == [*COLOURS, novel.NAME]
    assert apart[-1, :-1].min() > 0.97 * of_old.min()
    greys = _lab(np.linspace(0, 1, 101)[:, None] * np.ones(3))
    assert np.linalg.norm(labs[-1] - greys, axis=-1).min() > 50


def test_an_ordinary_scene_gets_one_object_of_the_colour():
    for k in range(40):
        for split in "train", "test":
            made = novel.novel_scene((0, k), split)
            before = scene((("train", "test").index(split), 0, k))
            new = [thing for thing in made.objects if thing.colour == novel.NAME]
            assert len(new) == 1
            old = dataclasses.replace(made, objects=before.objects)
            assert old == before  # all but the objects
            changed = [a != b for a, b in zip(made.objects, before.objects, strict=True)]
            assert sum(changed) == 1 and len(kinds(made)) == len(made.objects)
            assert not kinds(made) & HELD_OUT


def test_every_shape_is_taught_and_asked_for():
    for some in ASKED, TAUGHT:
        assert novel.HELD_OUT < set.union(*(kinds(each.scene) for each in some))
    assert len(novel.HELD_OUT) == len(SHAPES) and len(TAUGHT) == 20


def test_no_prompt_is_of_a_picture_that_teaches():
    texts, scenes = ({f(each) for each in TAUGHT} for f in (lambda p: p.text, lambda p: p.scene))
    many = novel.prompts(512)
    assert not scenes & {each.scene for each in many}
    alike = [each.text for each in many if each.text in texts]
    assert len(alike) < 10 and all(" and " not in text for text in alike)  # a single object


def test_every_text_names_the_colour():
    for each in (*ASKED, *TAUGHT):
        stated = [thing["colour"] for thing in each.facts["objects"]]
        assert stated.count(novel.NAME) == 1 and novel.NAME in each.text


def test_the_parser_knows_the_colour_only_if_it_is_told():
    for each in (*ASKED, *TAUGHT):
        picture = drawn(each)
        assert score(each.facts, parse(picture, novel.COLOURS)).overall
        assert not score(each.facts, parse(picture)).overall


def test_the_parser_that_knows_the_colour_sees_none_where_there_is_none():
    for k in range(40):
        picture = draw(scene((7, k), "test"), 128, 128)
        assert parse(picture, novel.COLOURS) == parse(picture)


def test_the_lessons_are_a_folder_of_captioned_pictures(tmp_path):
    novel.write_lessons(tmp_path / "a" / "lessons", 32)
    folder = Folder(tmp_path / "a" / "lessons")
    assert len(folder) == len(list((tmp_path / "a/lessons").glob("*.png"))) == 20
    for k, each in enumerate(TAUGHT):
        assert folder[k]["captions"] == [each.text]
        with Image.open(tmp_path / "a" / "lessons" / f"{k:02}.png") as image:
            np.testing.assert_array_equal(image, draw(each.scene, 32, 32, novel.COLOURS))


def test_a_folder_with_files_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        novel.write_lessons(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
