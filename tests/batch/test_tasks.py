"""Files of prompts, the ranges of their fields, and how tasks share batches."""

import json
import os
import re

import pytest

from sana_jax.batch import tasks
from sana_jax.batch.tasks import (
    Task,
    check_fields,
    make_batches,
    make_tasks,
    read_rows,
    with_defaults,
)
from sana_jax.pipeline.facts import Facts
from sana_jax.runtime.errors import UserError

COMMON = {"negative_prompt": "", "num_steps": 20, "guidance_scale": 4.5}


def rows_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(str(path))


def fields(rows):
    return [fields for _, fields in rows]


def test_text_file(tmp_path):
    content = "\ufeffa red circle\r\n\n   \n  A Fox\u2028on ice \n../../etc/x\nשלום 🎨\0".encode()
    prompts = [row["prompt"] for row in fields(rows_of(tmp_path, "p.txt", content))]
    assert prompts == ["a red circle", "A Fox\u2028on ice", "../../etc/x", "שלום 🎨\0"]


def test_jsonl_file(tmp_path):
    given = [
        {"prompt": ""},
        {"prompt": "two\nlines", "seed": 3, "height": 64, "width": 96},
        {"prompt": "a", "negative_prompt": "b", "guidance_scale": 1, "num_steps": 4},
    ]
    lines = [*map(json.dumps, given), "", r'{"prompt": "half \ud83c"}']
    found = fields(rows_of(tmp_path, "p.jsonl", "\n".join(lines)))
    assert found == [*given, {"prompt": "half \ud83c"}]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"good\n\nb\xffd\n", "p.txt line 3: it is not UTF-8"),
        ("p.txt", "a cat".encode("utf-16"), "p.txt line 1: it is not UTF-8"),
        ("p.txt", "\n  \n", "holds no prompt"),
        ("p.csv", "a cat", "give a .txt file"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: it is not JSON"),
        ("p.jsonl", "[" * 10**5, "line 1: it is not JSON"),
        ("p.jsonl", '["a"]', "line 1: it is no JSON object"),
        ("p.jsonl", '{"seed": 3}', 'line 1: "prompt" is missing'),
        ("p.jsonl", '{"prompt": null}', 'line 1: "prompt" is missing'),
        ("p.jsonl", '{"promt": "a"}', "line 1: unknown key 'promt'; did you mean prompt?"),
        ("p.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "line 1: 'seed' is there twice"),
        ("p.jsonl", '{"prompt": "a", "x": {"y": 1, "y": 2}}', "line 1: 'y' is there twice"),
        ("p.jsonl", '{"prompt": "a", "x": ' + "[" * 99 + "]" * 99 + "}", "nest more than 16"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "line 1: it is not JSON"),
        ("p.jsonl", '{"prompt": "' + "a" * 2**22 + '"}', "bytes, 4194304 at most"),
    ],
)
def test_bad_file(tmp_path, name, content, words):
    with pytest.raises(UserError, match=re.escape(words)):
        rows_of(tmp_path, name, content)


def test_null_is_absent_and_other_keys_are_kept(tmp_path):
    given = {"prompt": "a", "seed": None, "height": None, "tag": "two", "include": [{"count": 2}]}
    (row,) = rows_of(tmp_path, "METADATA.JSONL", json.dumps(given | {"note": None}))
    kept = {"tag": "two", "include": [{"count": 2}], "note": None}
    assert row[1] == {"prompt": "a", **kept}
    (task,) = make_tasks([row], COMMON, 3, 1)
    assert (task.seed, task.height, task.extras) == (3, None, kept)


@pytest.mark.parametrize(
    "name", ["tag", "include", "weight", "prompt_id", "prompts", "id", "提", ""]
)
def test_keys_of_other_programs_are_kept(name):
    row = ("", {"prompt": "a", name: 7})
    assert make_tasks([row], COMMON, 0, 1)[0].extras == {name: 7}


def test_a_file_of_prompts_has_a_largest_size(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"a")
    os.truncate(path, 2**27 + 1)
    with pytest.raises(UserError, match="has 134217729 bytes, 134217728 at most: split it"):
        read_rows(str(path))


def test_a_file_of_prompts_has_a_largest_number(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "MAX_IMAGES", 3)
    assert len(rows_of(tmp_path, "p.txt", "a\rb\r\n\nc\n")) == 3
    with pytest.raises(UserError, match="p.txt line 5: 3 prompts stand before it"):
        rows_of(tmp_path, "p.txt", "a\rb\r\n\nc\nd")


def test_the_longest_prompt(tmp_path):
    (row,) = rows_of(tmp_path, "p.txt", "é" * 2**20)
    assert len(make_tasks([row], COMMON, 0, 1)[0].prompt) == 2**20
    (row,) = rows_of(tmp_path, "p.txt", "a" * (2**20 + 1))
    with pytest.raises(UserError, match="p.txt line 1: prompt='a.*: it takes a string of up to"):
        make_tasks([row], COMMON, 0, 1)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UserError, match="^--prompts=.*p.txt is a pipe, where a file is needed"):
        read_rows(str(tmp_path / "p.txt"))


def test_file_that_cannot_be_read(tmp_path):
    for path in tmp_path / "absent.txt", tmp_path:
        with pytest.raises(UserError):
            read_rows(str(path))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"height": 0}, "height=0: it takes a whole number of pixels above 0"),
        ({"width": -32}, "width=-32"),
        ({"height": 32.5}, "height=32.5"),
        ({"height": None}, "height=None"),
        ({"seed": -1}, "seed=-1: it takes a whole number in 0 .. 18446744073709551615"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"seed": 7.0}, "seed=7.0"),
        ({"seed": "random"}, "seed='random'"),
        ({"num_steps": {}}, "num_steps={}"),
        ({"negative_prompt": ["a"]}, "negative_prompt=['a']: it takes a string"),
        ({"seed": True}, "seed=True"),
        ({"num_steps": 0}, "num_steps=0: it takes a whole number in 1 .. 1000"),
        ({"num_steps": 10**9}, "num_steps=1000000000"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf: it takes a number in 0 .. 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"guidance_scale": "4"}, "guidance_scale='4'"),
        ({"prompt": ["a"]}, "prompt=['a']: it takes a string"),
        ({"strength": 0}, "strength=0: it takes a number above 0, up to 1"),
        ({"strength": 1.5}, "strength=1.5: it takes a number above 0, up to 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": "0.5"}, "strength='0.5'"),
        ({"image": ""}, "image='': it takes the path of a picture"),
        ({"image": 7}, "image=7: it takes the path of a picture"),
        ({"mask": ["m.png"]}, "mask=['m.png']: it takes the path of a mask"),
        ({"sed": 1}, "unknown key 'sed'; did you mean seed?"),
        ({"Seed": 1}, "unknown key 'Seed'; did you mean seed?"),
        ({"heigth": 1}, "unknown key 'heigth'; did you mean height?"),
        ({"num-steps": 1}, "unknown key 'num-steps'; did you mean num_steps?"),
        ({"guidanceScale": 1}, "unknown key 'guidanceScale'; did you mean guidance_scale?"),
    ],
)
def test_bad_field(values, words):
    with pytest.raises(UserError) as error:
        make_tasks([("FILE line 7: ", {"prompt": "a", **values})], COMMON, 0, 1)
    assert str(error.value).startswith("FILE line 7: " + words)
    with pytest.raises(UserError) as error:
        check_fields(values, "--")
    assert str(error.value).startswith("--" + words)


def test_long_values_are_cut_in_complaints():
    with pytest.raises(UserError) as error:
        check_fields({"seed": "9" * 10**6}, "")
    assert len(str(error.value)) < 200


def test_seeds_count_up():
    rows = [("", {"prompt": "a"}), ("", {"prompt": "b", "seed": 70}), ("", {"prompt": "c"})]
    tasks = make_tasks(rows, COMMON, 10, 2)
    assert [t.seed for t in tasks] == [10, 11, 70, 71, 14, 15]
    assert [t.file for t in tasks][:3] == ["000000_10.png", "000001_11.png", "000002_70.png"]
    assert [t.prompt for t in tasks] == list("aabbcc")


def test_seeds_end_somewhere():
    last = 2**64 - 1
    assert make_tasks([("", {"prompt": "a"})] * 2, COMMON, last - 1, 1)[-1].seed == last
    with pytest.raises(UserError, match=f"^--seed={last}: .* end at {last}"):
        make_tasks([("", {"prompt": "a"})] * 2, COMMON, last, 1)
    with pytest.raises(UserError, match=f"^F line 1: seed={last}"):
        make_tasks([("F line 1: ", {"prompt": "a", "seed": last})], COMMON, 0, 2)


def test_too_many_images():
    with pytest.raises(UserError, match="--num_images_per_prompt=1000000000: 1 prompts x"):
        make_tasks([("", {"prompt": "a"})], COMMON, 0, 10**9)


def sizes(row=None, common=None, native=1024, max_pixels=4096 * 4096):
    row = ("F line 1: ", {"prompt": "a", **(row or {})})
    tasks = make_tasks([row], {**COMMON, **(common or {})}, 0, 1)
    (task,) = with_defaults(tasks, facts(native), max_pixels)
    return task.height, task.width


def facts(native=1024, is_sprint=False):
    return Facts(32, 1, native, 8, 300, 48, 3.0, is_sprint)


def test_what_is_left_to_the_checkpoint():
    rows = [("", {"prompt": "a"}), ("", {"prompt": "b", "image": "b.png", "num_steps": 7})]
    tasks = make_tasks(rows, {"guidance_scale": 4.5}, 0, 1)

    def found(is_sprint, num_steps=None):
        made = with_defaults(tasks, facts(is_sprint=is_sprint), 2**30, num_steps)
        return [(task.num_steps, task.strength) for task in made]

    assert found(False) == [(20, None), (7, 0.6)]
    assert found(True) == [(2, None), (7, 0.5)]
    assert found(True, 4) == [(4, None), (7, 0.5)]


def test_sizes():
    assert sizes() == (1024, 1024)
    assert sizes({"height": 512}, {"height": 64, "width": 96}) == (512, 96)
    assert sizes({"height": 8192, "width": 2048}) == (8192, 2048)
    assert sizes({"height": 4096, "width": 4096}) == (4096, 4096)
    assert sizes({"height": 65536, "width": 65536}, max_pixels=2**32) == (65536, 65536)
    assert sizes({"height": 1000}) == (1000, 1024)


@pytest.mark.parametrize(
    "row, common, words",
    [
        ({}, {"height": 65536}, "--height=65536: 65536 x 1024 pixels are more than --max_pixels"),
        ({}, {"height": 65536, "width": 32}, "--height=65536: 65536 x 32 pixels"),
    ],
)
def test_sizes_that_are_too_large(row, common, words):
    with pytest.raises(UserError) as error:
        sizes(row, common)
    assert str(error.value).startswith(words)


def test_batches_hold_one_shape_in_order():
    shapes = [dict(height=h, width=32, guidance_scale=g) for h in (32, 64) for g in (1.0, 4.5)]
    tasks = [Task(i, "a", i, **shapes[i * 7 % 4]) for i in range(41)]
    batches = make_batches(tasks, 4, 1)
    assert sorted(t.number for b in batches for t in b.tasks) == list(range(41))
    for batch in batches:
        assert len({t.shape for t in batch.tasks}) == 1
        numbers = [t.number for t in batch.tasks]
        assert numbers == sorted(numbers)
        assert batch.size == 4 == len(batch.padded())
        assert batch.padded()[: len(batch.tasks)] == batch.tasks
    assert sum(len(b.tasks) < 4 for b in batches) <= len(shapes)


@pytest.mark.parametrize(
    "count, batch_size, divisor, expected",
    [(3, 8, 1, [3]), (3, 8, 8, [8]), (20, 8, 1, [8] * 3), (20, 6, 4, [8] * 3), (1, 1, 1, [1])],
)
def test_batch_sizes(count, batch_size, divisor, expected):
    tasks = [Task(i, "a", i) for i in range(count)]
    assert [b.size for b in make_batches(tasks, batch_size, divisor)] == expected


def test_paths_of_a_line_begin_at_its_file(tmp_path):
    given = {"prompt": "a", "image": "in/a.png", "mask": "/m.png", "strength": 1}
    (row,) = rows_of(tmp_path, "p.jsonl", json.dumps(given))
    (task,) = make_tasks([row], COMMON, 0, 1)
    assert (task.image, task.mask) == (f"{tmp_path}/in/a.png", "/m.png")
    assert (task.strength, type(task.strength), task.extras) == (1.0, float, {})


def test_flags_of_images_are_for_the_prompts_that_have_one():
    rows = [("", {"prompt": "a", "image": "a.png"}), ("", {"prompt": "b"})]
    first, second = make_tasks(rows, {**COMMON, "strength": 0.3, "mask": "m.png"}, 0, 1)
    assert (first.strength, first.mask) == (0.3, "m.png")
    assert (second.image, second.strength, second.mask) == (None, None, None)
    (task,) = make_tasks(rows[1:], {**COMMON, "image": "b.png"}, 0, 1)
    assert (task.image, task.strength, task.mask) == ("b.png", None, None)


@pytest.mark.parametrize("name, value", [("strength", 0.5), ("mask", "m.png")])
def test_what_is_of_no_use_without_an_image_is_refused(name, value):
    row = ("F line 2: ", {"prompt": "a", name: value})
    with pytest.raises(UserError, match=f"^F line 2: {name}={value!r} is of no use without"):
        make_tasks([row], COMMON, 0, 1)
    with pytest.raises(UserError, match=f"^--{name}={value} is of no use .*: give --image$"):
        make_tasks([("", {"prompt": "a"})], {**COMMON, name: value}, 0, 1)


def test_batches_share_the_strength_and_whether_there_is_a_mask():
    starts = [{}, dict(strength=0.5), dict(strength=0.6), dict(strength=0.6, mask="m")]
    starts = [dict(start, image="a") if start else start for start in starts]
    tasks = [Task(i, "a", i, **starts[i % 4]) for i in range(12)]
    assert [[t.number % 4 for t in b.tasks] for b in make_batches(tasks, 3, 1)] == [
        [i] * 3 for i in range(4)
    ]
