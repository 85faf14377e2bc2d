"""Captions, read back from their words: what they state, whether it is true, and their scores."""

import collections
import itertools
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from sana_jax.data.captions import CaptionChoice
from sana_jax.shapes.captions import CAPTIONERS, captions, prompts
from sana_jax.shapes.language import VOCABULARY
from sana_jax.shapes.scene import COLOURS, HELD_OUT, SHAPES, SIZES, scene, truth

ROOT = Path(__file__).parents[2]
SCENES = [scene((0, i), split) for split in ("train", "test") for i in range(250)]
SAID = [(drawn, caption) for drawn in SCENES for caption in captions(drawn)]
PROMPTS = prompts(512, seed=1)

RELATION = r"(?:to the )?(left of|right of)|(above)|(below|under)"
PLACE = r"\b((?:top|bottom)(?: left| right)?|left|right|centre|middle)\b(?! of)"


def read_thing(text):
    words = re.findall(r"\w+", text)
    thing = {}
    for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        found = [word for word in words if word in known]
        assert len(found) <= 1, text
        if found:
            thing[name] = found[0]
    for place in re.findall(PLACE, text):
        thing["position"] = "centre" if place == "middle" else place
    return thing


def read_relation(text):
    """(text before the relation's words, its name, text after), or None."""
    found = re.search(rf"(.*?)\b(?:{RELATION})\b(.*)", text)
    if not found:
        return None
    name = next(filter(None, found.groups()[1:4])).replace("under", "below")
    return found[1], name, found[5]


def read(text, style):
    """The facts of a caption, by another route than the one that wrote it."""
    text = re.sub(
        r"^(a picture|an image) of |^(the picture shows |there (is|are) )?\w+ objects?: ", "", text
    )
    splits = {
        "short": r", and |, | and (?=an? )",
        "long": r"\. ?|, | and (?=an? )",
        "reordered": "; ",
        "noisy": "; |, ",
    }
    things, relations = [], []

    def index(thing):
        (found,) = [i for i, other in enumerate(things) if thing.items() <= other.items()]
        return found

    for part in filter(None, re.split(splits[style], text)):
        if not (related := read_relation(part)):
            things.append(read_thing(part))
            continue
        first, name, second = related
        if style == "reordered":  # both after the relation
            second, first = second.split(" is ")
        first, second = read_thing(first), read_thing(second)
        if style == "short":  # where they are introduced
            things += [first, second]
        relations.append([index(first), name, index(second)])
    return {"count": len(things), "objects": things, "relations": relations}


def canonical(facts):
    """Independent of the order of the objects."""
    things = [json.dumps(thing, sort_keys=True) for thing in facts["objects"]]
    related = sorted((things[i], name, things[j]) for i, name, j in facts["relations"])
    return facts["count"], sorted(things), related


def errors(facts, known):
    """The least number of false facts, over all ways to find the objects in the scene."""
    things, there = facts["objects"], known["objects"]
    if len(things) != len(there):
        return 1
    best = 99
    for order in itertools.permutations(range(len(there))):
        wrong = 0
        for thing, i in zip(things, order, strict=True):
            wrong += sum(there[i][name] != value for name, value in thing.items())
        for i, name, j in facts["relations"]:
            wrong += [order[i], name, order[j]] not in known["relations"]
        best = min(best, wrong)
    return best


@pytest.mark.parametrize("style", CAPTIONERS)
def test_captions_state_their_facts(style):
    pairs = [(each.text, each.facts) for _, each in SAID if each.style == style]
    pairs += [(each.text, each.facts) for each in PROMPTS if each.style == style]
    for text, facts in pairs:
        assert canonical(read(text, style)) == canonical(facts), text


def test_wrong_captions_are_those_that_are_false():
    for drawn, caption in SAID:
        assert errors(caption.facts, truth(drawn)) == caption.wrong, caption
    wrong = collections.Counter(each.style for _, each in SAID if each.wrong)
    assert set(wrong) == {"noisy"}
    assert 0.5 < wrong["noisy"] / len(SCENES) < 0.7


def test_words_are_those_of_the_vocabulary():
    used = set(re.findall(r"\w+", " ".join(each.text for _, each in SAID)))
    assert used == set(VOCABULARY)
    for _, each in SAID:
        assert re.fullmatch(r"[a-z,.:; ]+", each.text) and "  " not in each.text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", each.text)


def test_training_captions_never_name_a_held_out_combination():
    for drawn, each in SAID:
        if drawn.split == "train":
            named = {(thing["shape"], thing.get("colour")) for thing in each.facts["objects"]}
            assert not named & HELD_OUT


def test_captions_depend_on_the_scene_alone():
    assert captions(SCENES[3]) == captions(scene((0, 3)))
    assert [each.style for each in captions(SCENES[3])] == list(CAPTIONERS)
    first = [captions(scene(7, split))[1].text for split in ("train", "test")]
    assert first[0] != first[1]


def test_a_long_caption_can_say_all_of_four_objects_and_two_relations():
    whole = 0
    for index in range(2000):
        drawn = scene((9, index))
        known, long = truth(drawn), captions(drawn)[1]
        named = sum(len(thing) for thing in long.facts["objects"])
        places = sum(bool(thing["position"]) for thing in known["objects"])
        full = named == 12 + places and len(long.facts["relations"]) == 2
        whole += known["count"] == 4 and full
    assert whole >= 5


def test_scores_tell_truth_and_completeness_with_some_doubt():
    scores = collections.defaultdict(list)
    for _, each in SAID:
        assert 0 <= each.score <= 100
        scores[each.style if not each.wrong else "wrong"].append(each.score)
    means = {name: np.mean(values) for name, values in scores.items()}
    assert means["long"] > means["reordered"] + 0.3 > means["short"] + 0.6 > means["wrong"] + 5
    assert max(scores["wrong"]) > min(scores["short"])  # they overlap
    best = [max(captions(drawn), key=lambda each: each.score) for drawn in SCENES]
    assert np.mean([each.wrong == 0 for each in best]) > 0.97
    # The more complete caption wins often, but not always.
    assert 0.5 < np.mean([each.style == "long" for each in best]) < 0.9


def test_the_bundled_model_s_recipe_chooses_hardly_any_mistake():
    """By score, and still captions of every style."""
    config = runpy.run_path(str(ROOT / "configs/shapes.py"))["get_config"]()
    choose = CaptionChoice(**config.data.captions.to_dict())
    wrong, styles = 0.0, collections.Counter()
    for drawn in SCENES:
        said = captions(drawn)
        record = {"captions": [each.text for each in said], "scores": [each.score for each in said]}
        for each, share in zip(said, choose.probabilities(record), strict=True):
            wrong += share * bool(each.wrong)
            styles[each.style] += share
    print(f"wrong {wrong / len(SCENES):.2%}, styles {styles}")
    assert wrong < 0.01 * len(SCENES)
    assert min(styles.values()) > 0.05 * len(SCENES)


def test_prompts_are_balanced():
    assert prompts(512, seed=1) == PROMPTS
    assert prompts(8, seed=2) != PROMPTS[:8]
    counts = collections.Counter(each.facts["count"] for each in PROMPTS)
    styles = collections.Counter(each.style for each in PROMPTS)
    assert counts == dict.fromkeys([1, 2, 3, 4], 128)
    assert styles == dict.fromkeys(CAPTIONERS, 128)
    assert sum(bool(each.facts["relations"]) for each in PROMPTS) == 256
    cells = {
        (each.style, len(each.facts["objects"]), bool(each.facts["relations"])) for each in PROMPTS
    }
    assert len(cells) == 4 * (1 + 3 * 2)


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_of_the_test_split_name_held_out_combinations(split):
    for each in prompts(64, split=split):
        named = {(thing["shape"], thing["colour"]) for thing in each.facts["objects"]}
        assert bool(named & HELD_OUT) == (split == "test")
        assert len(named) == each.facts["count"]


def test_prompts_do_not_contradict_themselves():
    """Some scene has all that a prompt states: relations and places fit together."""
    sides = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}
    order = {"left": (0, 0), "right": (0, 1), "top": (1, 0), "bottom": (1, 1)}
    for each in PROMPTS:
        things = each.facts["objects"]
        for i, name, j in each.facts["relations"]:
            axis, sign = sides[name]
            places = []
            for thing in (things[i], things[j]):
                words = thing.get("position", "").split()
                places += [order[w][1] for w in words if w in order and order[w][0] == axis][:1]
            assert len(places) < 2 or (places[1] - places[0]) * sign >= 0
