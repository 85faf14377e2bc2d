"""GenEval's rules, by cases that are worked out by hand."""

import json

import pytest

from sana_jax.judges.geneval import judge, objects, relations, verdict
from sana_jax.judges.layouts import export
from sana_jax.runtime.errors import UserError
from tests.judges import runs


def found(name, box=(0, 0, 10, 10), score=0.95, **more):
    return {"class": name, "box": list(box), "score": score, **more}


@pytest.mark.parametrize(
    "box, expected",
    [
        ((0, 0, 10, 10), set()),  # the same place
        ((30, 0, 40, 10), {"right of"}),
        ((-30, 0, -20, 10), {"left of"}),
        ((0, 30, 10, 40), {"below"}),
        ((0, -30, 10, -20), {"above"}),
        ((30, 30, 40, 40), {"right of", "below"}),
        ((2, 0, 12, 10), set()),  # 2 px apart: a tenth of both widths
        # 3 px apart, of which 1 is left: less than half of the distance.
        ((3, 0, 13, 10), set()),
        ((5, 0, 15, 10), {"right of"}),  # 3 of 5 are left
        # 30 and 15 px apart: 28 / 33.5 and 13 / 33.5.
        ((30, 15, 40, 25), {"right of"}),
        # Large objects have to be further apart: 0.1 * (100 + 10) of 40.
        ((-5, -5, 95, 95), {"right of", "below"}),
    ],
)
def test_relations(box, expected):
    assert relations(box, (0, 0, 10, 10)) == expected


def test_only_sure_objects_count_the_surest_first_sixteen_at_most():
    seen = [found("cat", score=s) for s in (0.3, 0.31, 0.95, 0.9)] + [found("dog", score=0.2)]
    assert [x["score"] for x in objects(seen, "single_object")["cat"]] == [0.95, 0.9, 0.31]
    assert [x["score"] for x in objects(seen, "counting")["cat"]] == [0.95]
    assert objects(seen, "colors").keys() == {"cat"}
    assert len(objects([found("cat")] * 20, "x")["cat"]) == 16


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
RIGHT = {"class": "dog", "count": 1, "position": ["right of", 0]}


@pytest.mark.parametrize(
    "seen, wanted, expected",
    [
        ([found("cat")], {"include": [CAT]}, None),
        ([found("dog")], {"include": [CAT]}, "expected cat>=1, found 0"),
        ([found("cat")] * 3, {"include": [{"class": "cat", "count": 2}]}, None),
        (
            [found("cat")] * 3,
            {
                "include": [{"class": "cat", "count": 2}],
                "exclude": [{"class": "cat", "count": 3}],
            },
            "expected cat<3, found 3",
        ),
        # Only the surest cat is looked at, and it is red.
        (
            [found("cat", score=0.9, color="red"), found("cat", score=0.8, color="blue")],
            {"include": [CAT | {"color": "blue"}]},
            "expected blue cat>=1, found 0",
        ),
        ([found("cat", color="blue")], {"include": [CAT | {"color": "blue"}]}, None),
        ([found("cat"), found("dog", (30, 0, 40, 10))], {"include": [CAT, RIGHT]}, None),
        (
            [found("cat"), found("dog", (-30, 0, -20, 10))],
            {"include": [CAT, RIGHT]},
            "expected dog right of target, found left of target",
        ),
        (
            [found("dog", (30, 0, 40, 10))],
            {"include": [CAT, RIGHT]},
            "expected cat>=1, found 0\nno target for dog to be right of",
        ),
        # A target of the wrong colour is none.
        (
            [found("cat", color="red"), found("dog", (30, 0, 40, 10))],
            {"include": [CAT | {"color": "blue"}, RIGHT]},
            "expected blue cat>=1, found 0\nno target for dog to be right of",
        ),
        # Every pair has to be so: one of two dogs is on the left.
        (
            [found("cat"), found("dog", (30, 0, 40, 10)), found("dog", (-30, 0, -20, 10))],
            {"include": [CAT, RIGHT | {"count": 2}]},
            "expected dog right of target, found left of target",
        ),
    ],
)
def test_verdict(seen, wanted, expected):
    correct, wrong = verdict(objects(seen, "x"), wanted)
    assert correct == (expected is None) and "\n".join(wrong) == (expected or "")


@pytest.fixture
def layout(tmp_path):
    prompts = [
        {"prompt": "a cat", "tag": "single_object", "include": [CAT]},
        {"prompt": "a red dog", "tag": "colors", "include": [DOG | {"color": "red"}]},
    ]
    run = runs.write(tmp_path / "run", prompts, each=1)
    export("geneval", str(run), str(tmp_path / "layout"), each=1)
    return tmp_path


def line(p, *seen):
    return json.dumps({"filename": f"{p:05}/samples/00000.png", "detections": seen})


def test_results_have_the_fields_of_its_own_program(layout):
    lines = [line(0, found("cat")), line(1, found("dog", color="blue"))]
    (layout / "found.jsonl").write_text("\n".join(lines))
    rows = judge(str(layout / "layout"), str(layout / "found.jsonl"))
    assert [row["correct"] for row in rows] == [True, False]
    assert rows[1]["tag"] == "colors" and rows[1]["prompt"] == "a red dog"
    assert json.loads(rows[1]["details"]) == {"dog": [[0, 0, 10, 10]]}
    assert rows[0].keys() == {*"filename tag prompt correct reason metadata details".split()}


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "is empty"),
        (["{"], "line 1: it is not JSON"),
        (["[]"], "line 1: it is not JSON (it is no object)"),
        ([line(0, found("cat"))], "has no line for 1 pictures, such as 00001/samples/00000.png"),
        ([line(0), line(0)], "line 2: '00000/samples/00000.png' is no picture of --data, or"),
        ([line(7)], "is no picture of --data"),
        ([line(0, {"class": "cat"})], "line 1: it is not of the form that --help shows"),
        ([line(1, found("dog"))], "line 1: it is not of the form that --help shows: KeyError('col"),
        ([line(0, {"class": "cat", "score": 0.9})], "line 1: it is not of the form"),
        (["{}"], "line 1: it is not of the form"),
    ],
)
def test_bad_detections_are_named(layout, lines, words):
    (layout / "found.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        judge(str(layout / "layout"), str(layout / "found.jsonl"))
    assert words in str(error.value) and "UserError(" not in str(error.value)


def test_a_layout_that_lost_its_metadata_is_named(layout):
    (layout / "layout/pictures/00000/metadata.jsonl").unlink()
    (layout / "found.jsonl").write_text(line(0, found("cat")))
    with pytest.raises(UserError, match="00000/samples/00000.png: No such file"):
        judge(str(layout / "layout"), str(layout / "found.jsonl"))
