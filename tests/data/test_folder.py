"""A folder of images: which files, in which order, with which captions."""

import json
import os
import socket

import pytest

from sana_jax.data.folder import MAX_BYTES, Folder
from sana_jax.data.images import BadImage
from sana_jax.runtime.errors import Retry, UserError
from tests.data.bad_files import encode, picture

PNG = encode(picture(), "PNG")


def make(root, files: dict[str, bytes | str | dict]):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_every_image_below_in_the_order_of_paths(tmp_path):
    names = ["b.png", "a/z.JPG", "a/b/c.webp", "ä.gif", "a.png", "10.png", "9.png", "a.b.c.png"]
    others = ["notes.md", ".hidden.png", ".git/x.png", "__MACOSX/y.png", "a/.z.png", "c.exe"]
    folder = Folder(make(tmp_path, dict.fromkeys([*names, *others], PNG)))
    assert [folder[i]["key"] for i in range(len(folder))] == sorted(names)
    assert all(folder[i]["image"] == PNG for i in range(len(folder)))


def test_linked_files_are_read_and_linked_folders_are_not(tmp_path):
    make(tmp_path, {"real/a.png": PNG, "elsewhere/b.png": PNG})
    (tmp_path / "real/b.png").symlink_to(tmp_path / "elsewhere/b.png")
    (tmp_path / "real/loop").symlink_to(tmp_path / "real")
    (tmp_path / "real/gone.png").symlink_to(tmp_path / "nothing")
    folder = Folder(tmp_path / "real")
    assert [folder[i]["key"] for i in range(len(folder))] == ["a.png", "b.png"]
    (tmp_path / "elsewhere/b.png").unlink()
    with pytest.raises(BadImage, match="unreadable: b.png: No such file"):
        folder[1]


def test_what_is_no_file_is_counted_and_not_waited_for(tmp_path, caplog):
    make(tmp_path, {"a.png": PNG, "a.txt": "a cat"})
    for name in "b.png", "a.json", "metadata.jsonl":
        os.mkfifo(tmp_path / name)
    (tmp_path / "c.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "d.png").symlink_to(tmp_path / "b.png")
    with socket.socket(socket.AF_UNIX) as server, (tmp_path / "e.png").open("wb") as large:
        server.bind(os.path.relpath(tmp_path / "s.png"))
        large.truncate(MAX_BYTES + 1)
        folder = Folder(tmp_path)
    assert [(record["key"], record["captions"]) for record in folder] == [("a.png", ["a cat"])]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{tmp_path}: 1 in all; not read: images of more than 513 MiB (1), links to nothing (1),"
        " pipes and sockets (5)"
    )
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=f"^{tmp_path}: all images have more than 513 MiB"):
        Folder(tmp_path)


@pytest.mark.parametrize(
    "files, captions, scores, truth",
    [
        ({}, [], [], ""),
        ({"a.txt": " a cat \n\nune chatte à moi\r\n"}, ["a cat", "une chatte à moi"], [], ""),
        ({"a.txt": "\ufeffa cat"}, ["a cat"], [], ""),
        ({"a.json": {"captions": ["x", "y"], "scores": [1, 0.5]}}, ["x", "y"], [1.0, 0.5], ""),
        ({"a.json": {"captions": ["x"]}, "a.txt": "y"}, ["x"], [], ""),
        # A downloader's metadata does not hide the captions; a camera writes endings in capitals.
        ({"a.json": {"width": 7, "url": "u"}, "a.txt": "y"}, ["y"], [], ""),
        ({"a.json": {"truth": "t"}, "a.txt": "y"}, ["y"], [], "t"),
        ({"a.TXT": "y"}, ["y"], [], ""),
        ({"a.Json": {"caption": "y"}}, ["y"], [], ""),
        # Only line feeds end a caption, not what else Unicode and str.splitlines take for one.
        (
            {"a.txt": "a door\u2028with a\x0cbrass\x0bhandle\x85\n"},
            ["a door\u2028with a\x0cbrass\x0bhandle"],
            [],
            "",
        ),
        ({"a.json": {"captions": ["", "y "], "scores": [1, 2]}}, ["y"], [2.0], ""),
        ({"a.json": {"caption": "x", "width": 7}}, ["x"], [], ""),
        ({"a.json": {"truth": {"count": 2}}}, [], [], '{"count": 2}'),
        ({"a.json": {"width": 7}}, [], [], ""),
        ({"sub/a.txt": "another folder's"}, [], [], ""),
    ],
)
def test_captions(tmp_path, files, captions, scores, truth):
    record = Folder(make(tmp_path, {"a.png": PNG, **files}))[0]
    assert record == {
        "key": "a.png", "image": PNG, "captions": captions, "scores": scores, "truth": truth
    }  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {"a.txt": b"\xff\xfe\x00caption"},
        {"a.txt": "x" * (10 << 20)},
        {"a.json": "{"},
        {"a.json": "[" * 100_000},
        {"a.json": "[1]"},
        {"a.json": {"captions": None}},
        {"a.json": {"captions": "one text"}},
        {"a.json": {"captions": ["x", 7]}},
        {"a.json": {"captions": ["x", "y"], "scores": [1]}},
        {"a.json": {"captions": ["x"], "scores": [True]}},
        {"a.json": '{"captions": ["x"], "scores": [NaN]}'},
        {"a.json": {"caption": None}},
    ],
)
def test_bad_captions_have_a_reason(tmp_path, files):
    with pytest.raises(BadImage) as caught:
        Folder(make(tmp_path, {"a.png": PNG, **files}))[0]
    assert caught.value.reason == "bad_caption"


def test_the_image_is_named_where_its_captions_are_wrong(tmp_path):
    folder = Folder(make(tmp_path, {"b/a.png": PNG, "b/a.json": "{'captions': ['a door']}"}))
    with pytest.raises(BadImage, match="bad_caption: b/a.json: no JSON: ") as caught:
        folder[0]
    assert caught.value.key == "b/a.png"


def test_metadata_of_a_split_is_found_in_and_above_it(tmp_path):
    for name, file_name in ("metadata.jsonl", "Train/a.png"), ("Train/metadata.jsonl", "a.png"):
        line = {"file_name": file_name, "text": "a cat"}
        root = make(tmp_path / name, {"Train/a.png": PNG, "Test/b.png": PNG, name: line})
        folder = Folder(root, "train")
        assert (folder[0]["key"], folder[0]["captions"]) == ("a.png", ["a cat"])
        before = folder.listing
        make(root, {name: line | {"text": "two cats"}})
        assert Folder(root, "train").listing != before


def test_one_line_counts_what_is_not_read(tmp_path, caplog):
    files = [
        "train/a.png",
        "val/b.png",
        "c.HEIC",
        "train/d.heic",
        "e.mp4",
        "README",
        "train/.f.png",
    ]
    make(tmp_path, dict.fromkeys(files, PNG) | {"train/g.txt": "a cat", ".DS_Store": PNG})
    (tmp_path / "linked").symlink_to(tmp_path / "val")
    Folder(tmp_path, "train")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"{tmp_path}: split train: 1 of train; held out: 1 of val; not read: * without an ending"
        " (1), *.heic (2), *.mp4 (1), captions without an image (1), hidden images (1), linked"
        " folders (1)"
    )
    caplog.clear()
    Folder(make(tmp_path / "plain", {"a.png": PNG, "a.txt": "a cat"}), "train")
    assert not caplog.records


def test_a_split_may_be_a_linked_folder(tmp_path):
    make(tmp_path, {"real/a.png": PNG, "photos/val2017/b.png": PNG})
    (tmp_path / "photos/train2017").symlink_to(tmp_path / "real")
    (tmp_path / "real/train").symlink_to(tmp_path / "photos")
    folder = Folder(tmp_path / "photos", "train")
    assert [folder[i]["key"] for i in range(len(folder))] == ["a.png"]


def test_no_image_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no image in it or below"):
        Folder(make(tmp_path, {"a.txt": "a cat", ".b.png": PNG}))


def test_storage_that_is_away_is_worth_another_try(tmp_path):
    root = make(tmp_path / "data", {"a.png": PNG}).parent / "data"
    folder = Folder(root)
    os.rename(root, tmp_path / "other")
    with pytest.raises(Retry, match="is away"):
        folder[0]
