"""Scores parsed pictures of `shapes` against the facts that prompts state.

The objects that a prompt states are assigned to those in its picture, so that as many shapes and
colours as possible are right, and then as many other facts. All facts of an object that is missing
are wrong. A place may be missed by SLACK, which extends "left" to where "centre" begins. A relation
needs half the margin that it is stated with (a slack of 1 would accept "left of" for any centre
further left). A scene's own margins keep captions true by more than this.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from sana_jax.shapes.parse import Found
from sana_jax.shapes.scene import HELD_OUT, is_at, is_related

KINDS = ("count", "shape", "colour", "size", "position", "relation")
SLACK, RELATION_SLACK = 0.05, 0.5  # of is_at and is_related
ASSIGNED = 8  # objects of a picture, the largest, that stated ones may be


@dataclasses.dataclass(frozen=True)
class Score:
    """The facts of every kind that a prompt states, and how many are right in its picture.

    `objects` has, for every stated object, its stated facts and the kinds that are right.
    """

    stated: Counter
    right: Counter
    objects: tuple[tuple[dict, frozenset[str]], ...]

    @property
    def overall(self) -> bool:
        return self.right == self.stated


def score(facts: dict, found: Sequence[Found]) -> Score:
    """Scores facts (see language.py) against the objects of a picture, the largest first."""
    stated = Counter({"count": 1, "relation": len(facts["relations"])})
    for thing in facts["objects"]:
        stated.update(thing.keys())
    missing = max(0, facts["count"] - len(found))
    seen = [*found[:ASSIGNED], *[None] * missing]
    orders = itertools.permutations(seen, facts["count"])
    right, objects = max((_right(facts, order) for order in orders), key=_merit)
    right["count"] = int(len(found) == facts["count"])
    return Score(+stated, +right, objects)


def _merit(result: tuple[Counter, tuple]) -> tuple[int, int]:
    right, _ = result
    return right["shape"] + right["colour"], right.total()


def _right(facts: dict, order: Sequence[Found | None]) -> tuple[Counter, tuple]:
    """Returns the facts that are right if the stated objects are those of `order`."""
    objects = tuple(
        (thing, frozenset(kind for kind in thing if seen and _holds(kind, thing[kind], seen)))
        for thing, seen in zip(facts["objects"], order, strict=True)
    )
    right = Counter(kind for _, kinds in objects for kind in kinds)
    for i, name, j in facts["relations"]:
        a, b = order[i], order[j]
        if a and b:
            right["relation"] += is_related(name, (a.x, a.y), (b.x, b.y), RELATION_SLACK)
    return right, objects


def _holds(kind: str, value: str, seen: Found) -> bool:
    if kind == "position":
        return is_at(value, seen.x, seen.y, SLACK)
    return getattr(seen, kind) == value


def rates(scores: Sequence[Score]) -> dict[str, float | None]:
    """Returns `overall`, the share of pictures with every stated fact right, and the shares of
    right facts, in all (`facts`) and of each kind; None if none is stated.
    """
    stated = sum((each.stated for each in scores), Counter())
    right = sum((each.right for each in scores), Counter())
    found = {
        "overall": _share(each.overall for each in scores),
        "facts": right.total() / stated.total() if stated else None,
    }
    return found | {kind: right[kind] / stated[kind] if stated[kind] else None for kind in KINDS}


def overall_by(scores: Sequence[Score], keys: Sequence) -> dict[str, float]:
    """Returns `overall` of the pictures of each key, for JSON."""
    groups = defaultdict(list)
    for each, key in zip(scores, keys, strict=True):
        groups[key].append(each.overall)
    return {str(key): _share(groups[key]) for key in sorted(groups)}


def objects_by(scores: Sequence[Score], *names: str) -> dict[str, float]:
    """Returns the share of stated objects with all of `names` right, by their stated values."""
    groups = defaultdict(list)
    for thing, right in (pair for each in scores for pair in each.objects):
        if all(name in thing for name in names):
            groups[" ".join(thing[name] for name in names)].append(right.issuperset(names))
    return {key: _share(groups[key]) for key in sorted(groups)}


def held_out(
    scores: Sequence[Score], kinds: Collection[tuple[str, str]] = HELD_OUT
) -> dict[str, float]:
    """Returns the share with shape and colour right, for every held-out combination of `kinds`."""
    names = {f"{colour} {shape}" for shape, colour in kinds}
    shares = objects_by(scores, "colour", "shape")
    return {name: share for name, share in shares.items() if name in names}


def _share(hits: Iterable[bool]) -> float | None:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else None
