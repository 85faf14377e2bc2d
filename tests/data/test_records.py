"""Records: the fingerprint of a source, and what a damaged file raises."""

import json

import pytest

from sana_jax.data.images import BadImage
from sana_jax.data.records import Fingerprinted, captioned, fingerprint
from sana_jax.data.sources import open_source
from tests.data.bad_files import encode, picture
from tests.data.test_folder import PNG, make


def test_the_fingerprint_is_that_of_the_files(tmp_path):
    files = {f"{i}.png": encode(picture(i), "PNG") for i in range(5)}
    files["3.json"] = {"captions": ["a cat"]}
    print_of = {
        change: open_source(str(make(tmp_path / change, files | changed))).fingerprint
        for change, changed in {
            "none": {},
            "copy": {},
            "one bit": {"2.png": files["2.png"][:-1] + b"\x83"},
            "caption": {"3.json": {"captions": ["a dog"]}},
            "one more": {"5.png": PNG},
            "no image, but a caption": {"9.txt": "a cat"},
            "unreadable": {"3.json": "{"},
        }.items()
    }
    assert print_of["none"] == print_of["copy"] and len(print_of["none"]) == 16
    assert len(set(print_of.values())) == len(print_of) - 1


def test_the_fingerprint_of_many_reads_few():
    class Counting(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    records = Counting({"key": str(i), "image": b"", "captions": []} for i in range(10_000))
    first = fingerprint(records)
    assert records.reads <= 256
    records[-1]["captions"].append("not looked at")
    assert fingerprint(records) == first != fingerprint(records, "another description")
    assert json.dumps(first)


def test_a_record_that_its_file_rejects_is_a_bad_image():
    class Damaged(list):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("a checksum does not fit")
            return super().__getitem__(index)

    records = [{"key": str(i), "image": b"", "captions": []} for i in range(3)]
    source = Fingerprinted(Damaged(records), "three")
    assert (len(source), source[0], source[2]) == (3, records[0], records[2])
    with pytest.raises(BadImage, match="unreadable: RuntimeError: a checksum does not fit"):
        source[1]
    assert source.fingerprint != Fingerprinted(records, "three").fingerprint


def test_an_empty_caption_goes_with_all_that_is_its_own():
    styles = json.dumps({"captions": ["s", "t", "u"], "seed": 1})
    found = captioned(["x ", "", "z"], [1.0, 2.0, 3.0], styles)
    assert found["captions"] == ["x", "z"] and found["scores"] == [1.0, 3.0]
    assert json.loads(found["truth"]) == {"captions": ["s", "u"], "seed": 1}
    for truth in ("", "{", "[" * 10**5, '{"captions": 3}', '{"captions": [1, 2]}'):
        assert captioned(["x", ""], [], truth) == {
            "captions": ["x"], "scores": [], "truth": truth.replace(", 2", "")
        }  # fmt: skip
    with pytest.raises(BadImage, match="bad_caption: 2 captions but 1 scores"):
        captioned(["x", ""], [1.0], "")
    untouched = {"captions": ["x", "z"], "scores": [1.0], "truth": styles}
    assert captioned(**untouched) == untouched
