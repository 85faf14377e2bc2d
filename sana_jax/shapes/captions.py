"""Simulated captioners of `shapes`: captions, the facts that each states, and alignment scores.

The facts of a caption are chosen (`_choose`) and, by the noisy captioner, falsified (`_falsify`);
then language.py puts them in words. So text and facts always agree, whether they are true or not.
Every object of a scene is mentioned, unless it is missing by error.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from sana_jax.shapes import language as language
from sana_jax.shapes.language import pick
from sana_jax.shapes.scene import (
    COMBINATIONS,
    HELD_OUT,
    MAX_OBJECTS,
    OPPOSITE,
    POSITIONS,
    SPLITS,
    Scene,
    scene,
    truth,
)


@dataclasses.dataclass(frozen=True)
class Captioner:
    """The probabilities with which a captioner states each attribute, and its language."""

    words: Callable[[dict, np.random.Generator], str]
    colour: float
    size: float
    position: float
    relation: float  # of at least one, in scenes that have one
    max_relations: int
    wrong: float = 0.0  # of at least one error


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption with its facts; `wrong` counts its errors, `score` is like a CLIP score."""

    text: str
    style: str
    score: float
    facts: dict
    wrong: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption without errors, and the scene that it was made for, one of many that fit."""

    text: str
    style: str
    facts: dict
    scene: Scene


CAPTIONERS = {
    "short": Captioner(language.short, 0.85, 0.1, 0.25, 0.5, 1),
    "long": Captioner(language.long, 1.0, 0.9, 0.9, 0.85, 2),
    "reordered": Captioner(language.reordered, 0.95, 0.5, 0.7, 0.6, 2),
    "noisy": Captioner(language.telegram, 0.9, 0.3, 0.4, 0.4, 2, wrong=0.6),
}


def captions(scene: Scene) -> list[Caption]:
    """Returns one caption of every captioner, in the order of CAPTIONERS."""
    rng = np.random.default_rng([2 + SPLITS.index(scene.split), len(scene.seed), *scene.seed])
    known = truth(scene)
    return [_caption(style, known, rng) for style in CAPTIONERS]


def prompts(
    count: int,
    seed: int = 0,
    split: str = "test",
    scenes: Callable[[tuple[int, ...], str], Scene] = scene,
) -> list[Prompt]:
    """Makes prompts for evaluation: a quarter each of 1, 2, 3 and 4 objects, half with a relation.

    The captioners' styles have equal shares. Colours are always stated, so every prompt of the test
    split names a held-out combination. No prompt contradicts itself. `scenes` makes the scene of a
    seed and a split.
    """
    rng = np.random.default_rng([4, seed])
    several = [k for k in range(count) if k % MAX_OBJECTS]
    related = set(rng.permutation(several)[: count // 2].tolist())
    styles = list(CAPTIONERS)
    return [
        _prompt(
            style=styles[k // MAX_OBJECTS % len(styles)],
            objects=1 + k % MAX_OBJECTS,
            related=k in related,
            seed=(seed, k),
            split=split,
            rng=rng,
            scenes=scenes,
        )
        for k in range(count)
    ]


def _prompt(style: str, objects: int, related: bool, seed, split: str, rng, scenes) -> Prompt:
    attempts = (scenes((*seed, attempt), split) for attempt in itertools.count())
    drawn, known = next(
        (drawn, known)
        for drawn in attempts
        if (known := truth(drawn))["count"] == objects and (known["relations"] or not related)
    )
    captioner = dataclasses.replace(CAPTIONERS[style], colour=1.0, relation=float(related))
    facts = _choose(captioner, known, rng)
    return Prompt(captioner.words(facts, rng), style, facts, drawn)


def _caption(style: str, known: dict, rng: np.random.Generator) -> Caption:
    captioner = CAPTIONERS[style]
    facts, wrong = _choose(captioner, known, rng), 0
    if rng.random() < captioner.wrong:
        facts, wrong = _falsify(facts, rng)
    score = _score(facts, wrong, known, rng)
    return Caption(captioner.words(facts, rng), style, score, facts, wrong)


def _choose(captioner: Captioner, known: dict, rng: np.random.Generator) -> dict:
    """Chooses the facts that the captioner states, the objects in random order."""
    order = rng.permutation(known["count"]).tolist()
    things = [known["objects"][i] for i in order]
    relations = []
    if known["relations"] and rng.random() < captioner.relation:
        named = [known["relations"][k] for k in rng.permutation(len(known["relations"]))]
        # One direction of each pair.
        pairs = list({frozenset((i, j)): (i, name, j) for i, name, j in named}.values())
        most = min(len(pairs), captioner.max_relations)
        relations = [
            [order.index(i), name, order.index(j)]
            for i, name, j in pairs[: rng.integers(1, most + 1)]
        ]
    # Without colours, things alike in shape could not be told apart.
    unique = len({thing["shape"] for thing in things}) == len(things)
    colours = not unique or rng.random() < captioner.colour
    # A caption for one relation has no room for places beside it.
    places = not relations or captioner.max_relations > 1
    share = {
        "shape": 1.0,
        "colour": float(colours),
        "size": captioner.size,
        "position": places * captioner.position,
    }
    objects = [
        {name: thing[name] for name in share if thing[name] and rng.random() < share[name]}
        for thing in things
    ]
    return {"count": len(objects), "objects": objects, "relations": relations}


def _falsify(facts: dict, rng: np.random.Generator) -> tuple[dict, int]:
    """Returns the facts with one or two errors of different kinds, and their number."""
    objects, relations = [dict(thing) for thing in facts["objects"]], list(facts["relations"])
    kinds = sorted({name for thing in objects for name in thing})
    kinds += ["count"] + ["relation"] * bool(relations)
    chosen = rng.permutation(kinds)[: rng.integers(1, 3)].tolist()
    if "count" in chosen:
        return _miscount(objects, relations, rng), 1
    for kind in chosen:
        if kind == "relation":
            k = rng.integers(len(relations))
            i, name, j = relations[k]
            relations[k] = [i, OPPOSITE[name], j]
            continue
        thing = pick([thing for thing in objects if kind in thing], rng)
        if kind == "size":
            thing[kind] = "small" if thing[kind] == "large" else "large"
        elif kind == "position":  # "left" would be right of "top left"
            words = set(thing[kind].split())
            thing[kind] = pick([name for name in POSITIONS if not words & set(name.split())], rng)
        else:
            thing |= _unused(objects, {k: thing[k] for k in thing if k != kind}, rng)
    return {"count": len(objects), "objects": objects, "relations": relations}, len(chosen)


def _miscount(objects: list[dict], relations: list, rng: np.random.Generator) -> dict:
    """Adds an object to the facts, or leaves one out."""
    if len(objects) == 1 or (len(objects) < MAX_OBJECTS and rng.random() < 0.5):
        objects.append(_unused(objects, {}, rng))
    else:
        gone = int(rng.integers(len(objects)))
        del objects[gone]
        relations = [
            [i - (i > gone), name, j - (j > gone)] for i, name, j in relations if gone not in (i, j)
        ]
    return {"count": len(objects), "objects": objects, "relations": relations}


def _unused(objects: list[dict], keep: dict, rng: np.random.Generator) -> dict:
    """Picks a combination that no object has, with the shape or colour of `keep`."""
    names = ("shape", "colour") if "colour" in objects[0] else ("shape",)
    taken = [{name: thing[name] for name in names} for thing in objects]
    free = [
        kind
        for shape, colour in COMBINATIONS
        if (shape, colour) not in HELD_OUT
        and keep.get("shape", shape) == shape
        and ("colour" not in names or keep.get("colour", colour) == colour)
        and (kind := {name: {"shape": shape, "colour": colour}[name] for name in names})
        not in taken
    ]
    return pick(free, rng)


def _score(facts: dict, wrong: int, known: dict, rng: np.random.Generator) -> float:
    """Draws a score like CLIP's: higher for more facts, lower for errors, with noise.

    Its mean runs from 18 (all wrong) to 32 (all stated), its standard deviation is 1.
    """
    said = 1 + sum(map(len, facts["objects"])) + len(facts["relations"])
    places = sum(thing["position"] is not None for thing in known["objects"])
    sayable = 1 + 3 * known["count"] + places + len(known["relations"]) // 2
    share = max(0, said - wrong) / sayable
    return round(float(18 + 9 * np.exp(-wrong) + 5 * share + rng.normal()), 2)
