"""The language of `shapes`: facts put in words, in four ways, from a closed vocabulary.

Facts are, for JSON,

    {"count": 2,
     "objects": [{"shape": "ring", "colour": "red", "size": "small", "position": "top left"},
                 {"shape": "star"}],                    # what is not stated is not there
     "relations": [[0, "left of", 1]]}                  # the ring is left of the star

All text is lower case. Choices that the grammar leaves open are random.
"""

from collections.abc import Sequence

import numpy as np

from sana_jax.shapes.scene import COLOURS, SHAPES, SIZES

COUNTS = ("one object", "two objects", "three objects", "four objects")
PICTURES = ("", "", "a picture of ", "an image of ")
OPENINGS = ("{}: ", "the picture shows {}: ", "there {are} {}: ")
PLACES = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("at the top left", "in the top left corner"),
    "top right": ("at the top right", "in the top right corner"),
    "bottom left": ("at the bottom left", "in the bottom left corner"),
    "bottom right": ("at the bottom right", "in the bottom right corner"),
    "centre": ("in the centre", "in the middle"),
}
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
PLACED = ("{} is {}", "{} there is {}")  # place, noun
TURNED = ("a {shape} that is {words}", "a {shape}, {words}")

VOCABULARY = tuple(
    sorted(
        set(
            " ".join(
                [*SHAPES, *COLOURS, *SIZES, *COUNTS, *PICTURES]
                + [*sum(PLACES.values(), ()), *sum(RELATIONS.values(), ())]
                + ["the picture shows there are is a an and that"]
            ).split()
        )
    )
)


def pick(options: Sequence, rng: np.random.Generator):
    return options[rng.integers(len(options))]


def _noun(thing: dict, article: str = "a") -> str:
    """Returns a noun with its stated facts, such as "a small red circle"."""
    words = " ".join(thing[name] for name in ("size", "colour", "shape") if name in thing)
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def _name(thing: dict, article: str = "the") -> str:
    """Returns a name that tells the object from the others, such as "the red circle"."""
    return _noun({name: thing[name] for name in ("shape", "colour") if name in thing}, article)


def _place(thing: dict, rng) -> str:
    return pick(PLACES[thing["position"]], rng) if "position" in thing else ""


def _list(items: list[str], last: str = " and ") -> str:
    return last.join([", ".join(items[:-1])] * (len(items) > 1) + items[-1:])


def short(facts: dict, rng: np.random.Generator) -> str:
    """ "a red circle above a blue square, and a green star": at most one relation."""
    items = [f"{_noun(thing)} {_place(thing, rng)}".strip() for thing in facts["objects"]]
    last = " and "
    for i, name, j in facts["relations"]:
        first = f"{items[i]} {pick(RELATIONS[name], rng)} {items[j]}"
        items = [first] + [item for k, item in enumerate(items) if k not in (i, j)]
        last = ", and "
    return pick(PICTURES, rng) + _list(items, last)


def long(facts: dict, rng: np.random.Generator) -> str:
    """Counts, lists the objects with all that is stated, and then the relations."""
    items = [f"{_noun(thing)} {_place(thing, rng)}".strip() for thing in facts["objects"]]
    opening = pick(OPENINGS, rng).format(
        COUNTS[facts["count"] - 1], are="is" if facts["count"] == 1 else "are"
    )
    sentences = [opening + _list(items)]
    for i, name, j in facts["relations"]:
        first, second = _name(facts["objects"][i]), _name(facts["objects"][j])
        sentences.append(f"{first} is {pick(RELATIONS[name], rng)} {second}")
    return ". ".join(sentences) + "."


def reordered(facts: dict, rng: np.random.Generator) -> str:
    """Places before objects, shapes before colours, and relations from their far end."""
    items = []
    for thing in facts["objects"]:
        words = " and ".join(thing[name] for name in ("colour", "size") if name in thing)
        noun = pick(TURNED, rng).format(words=words, **thing) if words else _noun(thing)
        place = _place(thing, rng)
        items.append(pick(PLACED, rng).format(place, noun) if place else f"there is {noun}")
    for i, name, j in facts["relations"]:
        first, second = _name(facts["objects"][i]), _name(facts["objects"][j])
        items.append(f"{pick(RELATIONS[name], rng)} {second} is {first}")
    return "; ".join(items)


def telegram(facts: dict, rng: np.random.Generator) -> str:
    """ "small red circle top left, blue square; red circle above blue square"."""
    things = facts["objects"]
    items = [f"{_noun(thing, '')} {thing.get('position', '')}".strip() for thing in things]
    relations = [
        f"{_name(things[i], '')} {name} {_name(things[j], '')}" for i, name, j in facts["relations"]
    ]
    return "; ".join([", ".join(items), *relations])
