"""The captions of images from the files beside them, sound and mutated ones."""

import io
import json
import random
import tracemalloc

import pytest

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import BadImage
from sana_jax.data.sidecars import MAX_BYTES, Sidecars
from sana_jax.runtime.errors import UserError


def sidecars(files: dict[str, bytes | str | dict | list], images=("a.png",)) -> Sidecars:
    """The captions in `files`; a list is a file of lines in JSON."""

    def content(value) -> bytes:
        if isinstance(value, list):
            value = "\n".join(map(json.dumps, value)) + "\n"
        if isinstance(value, dict):
            value = json.dumps(value)
        return value if isinstance(value, bytes) else value.encode()

    return Sidecars(files, images, lambda name: io.BytesIO(content(files[name])))


@pytest.mark.parametrize(
    "files, captions",
    [
        ({"a.txt": "x\n y \n"}, ["x", "y"]),
        ({"a.caption": "x\n y \n"}, ["x", "y"]),
        ({"a.CAPTION": "x", "a.json": {"width": 7}}, ["x"]),
        ({"a.txt": "x", "a.caption": "y"}, ["x"]),
        ({"metadata.jsonl": [{"file_name": "a.png", "text": " x "}]}, ["x"]),
        ({"metadata.jsonl": [{"file_name": "./a.png", "caption": "x", "width": 3}]}, ["x"]),
        ({"metadata.jsonl": [{"file_name": "a.png", "captions": ["x", "", "y"]}]}, ["x", "y"]),
        ({"metadata.jsonl": [{"file_name": "a.png", "text": t} for t in "xy"]}, ["x", "y"]),
        ({"metadata.jsonl": [{"file_name": "a.png"}, {"file_name": "b.png", "text": "y"}]}, []),
        ({"metadata.jsonl": [{"file_name": "a.png", "text": "x"}], "a.txt": "y"}, ["y"]),
        # What is empty, null or of another kind has no captions, and hides none.
        ({"a.txt": " \n", "a.caption": "y"}, ["y"]),
        ({"a.txt": "", "metadata.jsonl": [{"file_name": "a.png", "text": "x"}]}, ["x"]),
        ({"a.json": {"captions": [""]}, "a.txt": "y"}, ["y"]),
        ({"a.json": {"captions": None, "caption": "x"}}, ["x"]),
        ({"a.json": {"caption": None}, "a.txt": "y"}, ["y"]),
        ({"a.json": '[{"box": [1, 2, 3, 4]}]', "a.txt": "y"}, ["y"]),
        ({"metadata.jsonl": [{"file_name": "a.png", "caption": None, "text": "x"}]}, ["x"]),
        ({"metadata.jsonl": [{"file_name": "a.png", "text": "x"}], "a.json": {"url": ""}}, ["x"]),
    ],
)
def test_the_first_file_with_captions_is_used(files, captions):
    assert sidecars(files)["a.png"]["captions"] == captions


def test_metadata_names_images_from_its_own_folder():
    images = ["train/a.png", "train/b/c.png"]
    files = {
        "metadata.jsonl": [{"file_name": "train/a.png", "text": "x"}],
        "train/b/metadata.jsonl": [{"file_name": "c.png", "text": "y"}],
    }
    found = sidecars(files, images)
    assert [found[image]["captions"] for image in images] == [["x"], ["y"]]


@pytest.mark.parametrize(
    "table, captions",
    [
        ("file_name,text\na.png,a cat\n", ["a cat"]),
        ("\ufefffile_name,text\r\na.png,a cat\r\nb.png,x\r\n", ["a cat"]),
        ('\ufeff"text","file_name"\n"a ""cat"",\nin two lines",a.png', ['a "cat",\nin two lines']),
        ("width,file_name,caption\n7,b.png,y\n\n7,./a.png,ein Kätzchen\n7,a.png,x", None),
        ('file_name,captions,scores\na.png,"[""x"", """", ""y""]","[1, 2, 3]"\n', ["x", "y"]),
        ("file_name,text\na.png,\n", []),
        ("file_name,text\na.png\n", []),
        ("text\nx\n", []),
        ("", []),
    ],
)
def test_a_table_of_metadata_is_read(table, captions):
    found = sidecars({"metadata.csv": table})["a.png"]
    assert found["captions"] == (["ein Kätzchen", "x"] if captions is None else captions)
    assert found["scores"] == ([1.0, 3.0] if "scores" in table else [])


def test_rows_of_a_table_that_cannot_be_used_are_counted_or_named():
    rows = [b"file_name,captions", b"a.png,[7]", b"c.png,", b",", b"b.png,x", b"\xff,", b""]
    too_long = b'a.png,"' + b"x" * (3 * MAX_BYTES)
    for more in [], [too_long]:
        table = b"\n".join([*rows, *more])
        found = sidecars({"metadata.csv": table}, images=("a.png", "b.png"))
        for image, number, why in ("a.png", 2, "list of strings"), ("b.png", 5, "list"):
            message = f"metadata.csv line {number}: 'captions' is no {why}"
            with pytest.raises(BadImage, match=message):
                found[image]
        if not more:
            assert +found.left_out == {
                "lines of metadata.csv for no image": 2,
                "lines of metadata.csv without a file_name": 1,
            }


def test_two_kinds_of_metadata_are_refused():
    files = {"metadata.csv": "file_name,text\na.png,x", "b/metadata.jsonl": "{}"}
    with pytest.raises(UserError, match="^b/metadata.jsonl and metadata.csv: .*remove the other"):
        sidecars(files)


def test_lines_that_are_of_no_image_are_counted_and_the_others_are_read():
    lines = [b'{"file_name": "a.png", "text": "x"}\r', b"{", b"", b"\xff\xfe", b'"a.png"']
    lines += [b"[" * 10**5, b'{"file_name": 7}', b'{"file_name": "../a.png", "text": "y"}']
    lines += [b"x" * (3 * MAX_BYTES), b'{"file_name": "b.png", "text": "z"}', b'{"file_name": "a.p']
    found = sidecars({"metadata.jsonl": b"\n".join(lines), "c.txt": "a"}, images=("a.png", "b.png"))
    assert [found[name]["captions"] for name in ("a.png", "b.png")] == [["x"], ["z"]]
    assert +found.left_out == {
        "lines of metadata.jsonl without a file_name": 7,
        "lines of metadata.jsonl for no image": 1,
        "captions without an image": 1,
    }


def test_a_line_that_is_wrong_is_named():
    lines = [{"file_name": "b.png"}, {"file_name": "a.png", "text": 7}]
    with pytest.raises(BadImage, match="bad_caption: metadata.jsonl line 2: 'text' is no string"):
        sidecars({"metadata.jsonl": lines})["a.png"]
    scored = [{"file_name": "a.png", "captions": ["x"], "scores": [1]}]
    scored += [{"file_name": "a.png", "captions": ["y"]}]
    with pytest.raises(BadImage, match="metadata.jsonl: some captions have no score"):
        sidecars({"metadata.jsonl": scored})["a.png"]


def test_an_empty_caption_takes_its_score_and_its_style_along():
    styles = [{"style": "long"}, {"style": "noisy"}, {"style": "short"}]
    values = {"captions": ["x", " ", "z"], "scores": [30, 20, 10], "truth": {"captions": styles}}
    record = {"key": "a.png", **sidecars({"a.json": values})["a.png"]}
    assert (record["captions"], record["scores"]) == (["x", "z"], [30.0, 10.0])
    for style, expected in ("long", [1, 0]), ("short", [0, 1]):
        choice = CaptionChoice("proportion", proportions={style: 1})
        assert choice.probabilities(record).tolist() == expected
    with pytest.raises(BadImage, match="has a part in the proportions"):
        CaptionChoice("proportion", proportions={"noisy": 1}).probabilities(record)


@pytest.mark.parametrize("text", [b"\0" * 9, "a cat".encode("utf-16-le"), "a cat".encode("utf-16")])
def test_nuls_are_no_caption(text):
    with pytest.raises(BadImage, match="bad_caption: a.txt is not UTF-8 text"):
        sidecars({"a.txt": text})["a.png"]


@pytest.mark.parametrize("score", ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "NaN", "-Infinity"])
def test_scores_that_are_no_numbers_of_this_world(score):
    text = f'{{"captions": ["x"], "scores": [{score}]}}'
    with pytest.raises(BadImage, match="bad_caption: a.json: "):
        sidecars({"a.json": text})["a.png"]


@pytest.mark.parametrize("depth", [500, 900, 980, 10**5])
def test_a_truth_of_any_depth_is_taken_or_refused(depth):
    nested = "[" * depth + "]" * depth
    for truth in nested, json.dumps(nested):
        text = f'{{"captions": ["x", "", "y"], "truth": {truth}}}'
        try:
            record = {"key": "a.png", **sidecars({"a.json": text})["a.png"]}
        except BadImage as error:
            assert error.reason == "bad_caption"
        else:
            choice = CaptionChoice("proportion", proportions={0: 1, 1: 3})
            assert choice.probabilities(record).tolist() == [0.25, 0.75]


def test_mutated_files_give_captions_or_a_reason_in_little_memory():
    rng = random.Random(0)
    whole = {
        "a.json": b'{"captions": ["a cat", "\xc3\xa4"], "scores": [1.5, 2], "truth": {}}',
        "a.txt": b"a cat\r\nein K\xc3\xa4tzchen\n",
        "metadata.jsonl": b'{"file_name": "a.png", "text": "a cat", "scores": [1]}\n' * 3,
        "metadata.csv": b'file_name,captions,scores\na.png,"[""a cat""]",[1]\n' * 2,
    }
    pieces = [b"[", b'"', b"{", b"}", b"null", b"\n", b"\0", b"\xff", b"1e999", b"9" * 401]
    tracemalloc.start()
    for _ in range(1500):
        name = rng.choice(list(whole))
        data = bytearray(whole[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 9)] = rng.choice(pieces) * rng.choice([1, 1, 1, 2000])
        try:
            found = sidecars({name: bytes(data)})["a.png"]
        except BadImage as error:
            assert error.reason == "bad_caption"
        else:
            assert len(found["scores"]) in (0, len(found["captions"]))
            assert all(caption.strip() for caption in found["captions"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
