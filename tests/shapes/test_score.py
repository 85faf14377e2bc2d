"""Facts against pictures that differ from them in one respect."""

import collections
import dataclasses

import pytest

from sana_jax.shapes.draw import draw
from sana_jax.shapes.parse import Found, parse
from sana_jax.shapes.scene import scene, truth
from sana_jax.shapes.score import held_out, objects_by, overall_by, rates, score

FACTS = {
    "count": 2,
    "objects": [
        {"shape": "ring", "colour": "red", "size": "small", "position": "left"},
        {"shape": "star", "colour": "blue"},
    ],
    "relations": [[0, "left of", 1]],
}
RING = Found("ring", "red", x=0.2, y=0.5, radius=0.12)
STAR = Found("star", "blue", x=0.7, y=0.4, radius=0.19)


def wrong(facts, found):
    result = score(facts, found)
    return dict(+(result.stated - result.right))


def change(thing, **changes):
    return dataclasses.replace(thing, **changes)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([RING, STAR], {}),
        ([STAR, RING], {}),
        ([change(RING, colour="pink"), STAR], {"colour": 1}),
        ([change(RING, shape="circle"), STAR], {"shape": 1}),
        ([change(RING, radius=0.18), STAR], {"size": 1}),
        ([RING, STAR, change(STAR, x=0.9)], {"count": 1}),
        ([STAR], {"count": 1, "shape": 1, "colour": 1, "size": 1, "position": 1, "relation": 1}),
        ([RING], {"count": 1, "shape": 1, "colour": 1, "relation": 1}),
        ([change(RING, x=0.7), change(STAR, x=0.2)], {"position": 1, "relation": 1}),
        # Colours change places: one shape and one colour are right in either assignment.
        ([change(RING, colour="blue"), change(STAR, colour="red")], {"colour": 2}),
        # Within the slack, and beyond it.
        ([change(RING, x=0.41), STAR], {}),
        ([change(RING, x=0.43), STAR], {"position": 1}),
        ([RING, change(STAR, x=0.32)], {}),
        ([RING, change(STAR, x=0.30)], {"relation": 1}),
        ([RING, change(STAR, x=0.4, y=0.8)], {"relation": 1}),
        ([], {"count": 1, "shape": 2, "colour": 2, "size": 1, "position": 1, "relation": 1}),
    ],
)
def test_the_wrong_facts_are_named(found, expected):
    assert wrong(FACTS, found) == expected


def stated(drawn):
    """All that is true of a scene."""
    known = truth(drawn)
    names = ("shape", "colour", "size", "position")
    things = [{name: thing[name] for name in names if thing[name]} for thing in known["objects"]]
    return {"count": known["count"], "objects": things, "relations": known["relations"]}


def test_mirrored_pictures():
    """Only what says left or right fails, and all of that."""
    sides = collections.Counter()
    for i in range(60):
        drawn = scene((8, i), "test")
        facts = stated(drawn)
        picture = draw(drawn, 128, 128)
        assert wrong(facts, parse(picture)) == {}
        expected = collections.Counter(
            position=sum(
                bool({"left", "right"} & set(thing.get("position", "").split()))
                for thing in facts["objects"]
            ),
            relation=sum(name in ("left of", "right of") for _, name, _ in facts["relations"]),
        )
        assert wrong(facts, parse(picture[:, ::-1])) == dict(+expected)
        sides += expected
    assert min(sides.values()) > 20


def test_rates():
    right = score(FACTS, [RING, STAR])
    pink = score(FACTS, [change(RING, colour="pink"), STAR])
    alone = score(
        {"count": 1, "objects": [{"shape": "star", "colour": "cyan"}], "relations": []}, []
    )
    found = rates([right, pink, alone])
    assert found["overall"] == pytest.approx(1 / 3)
    assert found["facts"] == pytest.approx((8 + 7) / (8 + 8 + 3))
    assert found["colour"] == pytest.approx(3 / 5) and found["relation"] == 1
    assert rates([alone])["relation"] is None
    assert overall_by([right, pink, alone], [2, 2, 1]) == {"1": 0, "2": 0.5}
    assert objects_by([right, pink, alone], "shape") == {"ring": 1, "star": pytest.approx(2 / 3)}
    assert objects_by([right, pink], "shape", "colour") == {"ring red": 0.5, "star blue": 1}


def test_held_out_are_the_combinations_without_training():
    known = {"shape": "circle", "colour": "orange"}
    other = {"shape": "circle", "colour": "red"}
    facts = {"count": 2, "objects": [known, other], "relations": []}
    found = [Found("circle", "orange", 0.2, 0.2, 0.12), Found("circle", "red", 0.7, 0.7, 0.12)]
    assert held_out([score(facts, found)]) == {"orange circle": 1}
    assert held_out([score(facts, found[1:])]) == {"orange circle": 0}
