"""A file or a folder that cannot be written leaves the one that was there."""

import json
import os

import pytest
from etils import epath

from sana_jax.runtime import files
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import (
    check_is_file,
    check_itself,
    check_new,
    local,
    named_file,
    parse_json,
    read_json,
    replace_folder,
    write_atomically,
)


def test_only_files_and_links_to_them_are_read(tmp_path):
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "file", tmp_path / "link")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in "file", "link", "absent":
        check_is_file(tmp_path / name, name)
    check_is_file("gs://bucket/x", "x")
    for name, kind in ("loop", "a link that leads"), ("pipe", "a pipe"), ("", "a folder"):
        with pytest.raises(UserError, match=f"^--data is {kind}"):
            check_is_file(tmp_path / name, "--data")


def test_write_atomically_leaves_no_part(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "a")
    write_atomically(path, b"old")
    monkeypatch.setattr(type(path), "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    path, synced = epath.Path(tmp_path / "a"), []

    def fsync(number):
        synced.append((os.fstat(number).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, b"whole")
    assert synced == [(5, False)] and path.read_bytes() == b"whole"


def test_two_writers_do_not_share_a_part(tmp_path):
    path = epath.Path(tmp_path / "a")
    (tmp_path / "a.part").write_text("another's")
    write_atomically(path, b"ours", ".1.part")
    assert path.read_bytes() == b"ours" and (tmp_path / "a.part").read_text() == "another's"


def test_a_folder_stays_until_the_next_is_whole(tmp_path):
    folder = tmp_path / "model"
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "half").touch()  # of a process that was killed
    with replace_folder(folder) as part:
        (part / "a").touch()
        assert not folder.exists()
    with pytest.raises(OSError), replace_folder(folder) as part:
        (part / "b").touch()
        raise OSError("full")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["model", "model/a"]
    with replace_folder(folder) as part:
        (part / "b").touch()
        assert [p.name for p in folder.iterdir()] == ["a"]
    assert [p.name for p in folder.iterdir()] == ["b"]


@pytest.mark.parametrize(
    "head, words",
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is a git-LFS pointer.*git lfs pull"),
        ("\n<!DOCTYPE html><html>", "is a web page.*download it again"),
        ("<?xml version='1.0'?><Error>", "is a web page"),
    ],
)
def test_what_stands_for_a_file_is_named(tmp_path, head, words):
    path = tmp_path / "config.json"
    path.write_text(head)
    for read in check_itself, read_json:
        with pytest.raises(UserError, match=f"config.json {words}"):
            read(path)
    path.write_text("<bos> is a text")
    check_itself(path)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "text", ["[" * 100_000, nested(102), "[" * 102 + "1" + "]" * 102, "9" * 5000]
)
def test_json_that_python_cannot_hold_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_of_reasonable_depth_is_read():
    assert parse_json(nested(3)) == {"a": {"a": {"a": 1}}}
    assert parse_json(nested(files.MAX_DEPTH)) == json.loads(nested(files.MAX_DEPTH))
    assert parse_json(b'[1, "a", null, []]') == [1, "a", None, []]


@pytest.mark.parametrize(
    "content, words",
    [
        (nested(200).encode(), "is not JSON .it is nested too deeply"),
        (b"[1]", "holds no JSON object"),
        (b"\xff\xfe", "is not JSON"),
        (b" " * (files.MAX_JSON + 1), "it is another file"),
    ],
)
def test_a_document_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"model.json.*{words}"):
        read_json(path)


def test_what_is_no_file_is_no_document(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in {
        "pipe.json": "is a pipe",
        "b.json": "missing",
        "c" * 300: "too long",
    }.items():
        with pytest.raises(UserError, match=words):
            read_json(tmp_path / name)
    (tmp_path / "d.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "d.json") == {"a": 1}


@pytest.mark.parametrize(
    "name, words",
    [
        (["a"], "no file's name"),
        (None, "no file's name"),
        ("a\0b", "no file's name"),
        ("", "outside its folder"),
        (".", "outside its folder"),
        ("../a", "outside its folder"),
        ("b/../../a", "outside its folder"),
        ("/a", "outside its folder"),
        ("a" * 300, "too long"),
        ("b", "is missing"),
        ("folder", "is missing"),
    ],
)
def test_a_document_names_files_of_its_own_folder(tmp_path, name, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").touch()
    assert named_file(tmp_path / "model.json", "folder/a") == tmp_path / "folder" / "a"
    with pytest.raises(UserError, match=f"model.json.*{words}|{words}.*model.json"):
        named_file(tmp_path / "model.json", name)


@pytest.mark.parametrize("name", ["", "a\0b", "caf\udce9", "\ud83d", None, 5, b"model"])
def test_what_can_be_no_path_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="path|not UTF-8|null character") as error:
        local(name)
    assert "\n" not in str(error.value) and str(error.value).isascii()


def test_the_tilde_is_the_users_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local("~/model") == check_new("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["model", "model.part"])
def test_a_file_in_the_place_of_a_folder_stays(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is a file, where a folder is needed; move it"):
        with replace_folder(tmp_path / "model") as part:
            (part / "weights").write_text("new")
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
