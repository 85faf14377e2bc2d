"""Scenes: a function of the seed, apart, named where clear, and never held out in training."""

import collections
import dataclasses
import itertools
import math

import pytest

from sana_jax.shapes.scene import (
    COLOURS,
    CONTRAST,
    HELD_OUT,
    OPPOSITE,
    POSITIONS,
    SHAPES,
    SIZES,
    is_at,
    is_related,
    position,
    relation,
    scene,
    truth,
)

TRAIN = [scene((0, i), "train") for i in range(600)]
TEST = [scene((0, i), "test") for i in range(300)]
BOTH = TRAIN + TEST


def kinds(scenes):
    return {(thing.shape, thing.colour) for drawn in scenes for thing in drawn.objects}


def test_the_seed_decides():
    assert scene((0, 3)) == TRAIN[3]
    assert scene(7) == scene((7,))
    # NumPy pads the words of a seed with zeros.
    several = [scene(seed) for seed in [5, (5, 0), (5, 0, 0), (0, 5), 6]] + [scene(5, "test")]
    assert len({drawn.objects for drawn in several}) == len(several)


def test_seeds_mean_what_they_meant():
    """Data sets and checkpoints refer to scenes by seed: a change of these needs a new VERSION."""
    things = scene((0, 1)).objects + scene((0, 1), "test").objects
    assert [f"{thing.size} {thing.colour} {thing.shape}" for thing in things] == [
        "large yellow heart", "small green ring", "small blue heart",
        "large blue square", "large cyan square", "small cyan circle", "small yellow circle",
    ]  # fmt: skip


def test_held_out_combinations_are_in_every_test_scene_and_no_training_scene():
    assert not kinds(TRAIN) & HELD_OUT
    for drawn in TEST:
        assert kinds([drawn]) & HELD_OUT
    assert kinds(TEST) >= HELD_OUT and kinds(TEST) - HELD_OUT


def test_training_shows_every_shape_and_colour_and_all_other_combinations():
    assert len(HELD_OUT) == 8
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)
    assert kinds(TRAIN) == set(itertools.product(SHAPES, COLOURS)) - HELD_OUT


def test_counts_and_sizes_are_balanced():
    counts = collections.Counter(len(drawn.objects) for drawn in BOTH)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 0.2 * len(BOTH)
    sizes = collections.Counter(thing.size for drawn in BOTH for thing in drawn.objects)
    assert min(sizes.values()) > 0.4 * sizes.total() and set(sizes) == set(SIZES)


def test_objects_differ_and_keep_apart():
    for drawn in BOTH:
        assert len(kinds([drawn])) == len(drawn.objects)
        for thing in drawn.objects:
            low, high = SIZES[thing.size]
            assert low <= thing.radius <= high
            reach = thing.radius + 0.019
            assert reach < thing.x < 1 - reach and reach < thing.y < 1 - reach
        for a, b in itertools.combinations(drawn.objects, 2):
            assert math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius + 0.039


def test_sizes_have_a_gap():
    assert SIZES["small"][1] * 1.3 < SIZES["large"][0]
    assert SIZES["small"][0] * 128 > 11  # pixels


def test_most_backgrounds_are_textured_by_the_stated_contrast():
    textured = [drawn.background for drawn in BOTH if drawn.background.texture != "plain"]
    assert len(textured) > 0.7 * len(BOTH)
    assert all(CONTRAST[0] <= background.contrast <= CONTRAST[1] for background in textured)
    plain = [drawn.background for drawn in BOTH if drawn.background.texture == "plain"]
    assert {background.contrast for background in plain} == {0.0}


@pytest.mark.parametrize(
    "x, y, name",
    [
        (0.2, 0.2, "top left"),
        (0.8, 0.2, "top right"),
        (0.2, 0.8, "bottom left"),
        (0.8, 0.8, "bottom right"),
        (0.2, 0.45, "left"),
        (0.8, 0.5, "right"),
        (0.4, 0.2, "top"),
        (0.6, 0.8, "bottom"),
        (0.5, 0.5, "centre"),
        (0.4, 0.5, None),
        (0.38, 0.38, None),
    ],
)
def test_position(x, y, name):
    assert position(x, y) == name
    assert all(is_at(name, x, y, slack) for slack in (0, 0.1) if name)


def test_slack_widens_the_places():
    assert is_at("left", 0.40, 0.5, slack=0.05) and not is_at("left", 0.40, 0.5)
    assert is_at("centre", 0.40, 0.5, slack=0.05) and not is_at("centre", 0.40, 0.5)
    assert set(POSITIONS) >= {position(t.x, t.y) for d in BOTH for t in d.objects} - {None}


@pytest.mark.parametrize(
    "a, b, name",
    [
        ((0.2, 0.5), (0.5, 0.6), "left of"),
        ((0.9, 0.5), (0.5, 0.6), "right of"),
        ((0.5, 0.1), (0.6, 0.6), "above"),
        ((0.5, 0.9), (0.6, 0.6), "below"),
        ((0.2, 0.2), (0.5, 0.5), None),  # diagonal
        ((0.4, 0.5), (0.6, 0.5), None),  # near
    ],
)
def test_relation(a, b, name):
    assert relation(a, b) == name
    assert relation(b, a) == OPPOSITE.get(name)


def test_slack_leaves_the_direction():
    assert is_related("left of", (0.4, 0.5), (0.45, 0.9), slack=1)
    assert not is_related("left of", (0.5, 0.5), (0.45, 0.5), slack=1)


def test_truth_says_what_the_scene_holds():
    for drawn in BOTH:
        known = truth(drawn)
        assert known["count"] == len(known["objects"]) == len(drawn.objects)
        for said, thing in zip(known["objects"], drawn.objects, strict=True):
            assert said.pop("position") == position(thing.x, thing.y)
            assert said == dataclasses.asdict(thing)
        for i, name, j in known["relations"]:
            assert [j, OPPOSITE[name], i] in known["relations"]
            a, b = drawn.objects[i], drawn.objects[j]
            edges = {
                "left of": b.x - a.x, "right of": a.x - b.x,
                "above": b.y - a.y, "below": a.y - b.y,
            }  # fmt: skip
            assert edges[name] > 0.21 and edges[name] == max(edges.values())
    for count, share in ((2, 0.6), (3, 0.95), (4, 0.99)):
        some = [bool(truth(drawn)["relations"]) for drawn in BOTH if len(drawn.objects) == count]
        assert sum(some) > share * len(some)
