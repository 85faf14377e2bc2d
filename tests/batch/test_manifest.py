"""The manifest survives a kill at any byte, a full disk and several threads."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from sana_jax.batch import manifest
from sana_jax.batch.manifest import Manifest, key_of
from sana_jax.runtime.errors import UserError


def line(i: int) -> dict:
    return {"file": f"{i:06d}_{i}.png", "prompt": "é\0\ud800\n", "sha256": "0", "key": str(i)}


def lines_of(path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().split("\n")[:-1]]


@pytest.fixture
def path(tmp_path):
    path = epath.Path(tmp_path / "manifest.jsonl")
    written = Manifest(path)
    for i in range(3):
        written.append(line(i))
    return path


def test_key_depends_on_every_setting_and_on_no_order():
    settings = {"prompt": "a", "seed": 1, "guidance_interval": (0.1, 0.9), "dtype": "float32"}
    key = key_of(settings)
    assert key == key_of(dict(reversed(settings.items())))
    assert key == key_of(json.loads(json.dumps(settings)))
    keys = {key_of({**settings, name: "other"}) for name in settings} | {key}
    assert len(keys) == len(settings) + 1
    assert len(key_of({"prompt": "\ud800\0"})) == 64


def test_a_line_a_picture(path):
    assert lines_of(path) == [line(0), line(1), line(2)]
    assert Manifest(path).lines == {line(i)["file"]: line(i) for i in range(3)}


def test_torn_at_every_byte(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = Manifest(path)
        assert len(found.lines) == sum(end <= size for end in ends)
        found.tidy()
        found.append(line(7))
        assert lines_of(path) == [*(line(i) for i in range(len(found.lines) - 1)), line(7)]


def test_tidy_drops_what_is_not_in_lines(path):
    path.write_bytes(path.read_bytes() * 2)
    found = Manifest(path)
    del found.lines[line(1)["file"]]
    found.tidy()
    assert lines_of(path) == [line(0), line(2)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "nonsense",
        '{"file": "a.png", "key": "b"}',
        '{"file": ["a.png"], "key": "b", "sha256": "c"}',
        '{"file": "a.png", "key": 1, "sha256": "c"}',
        '{"file": "a.png", "key": "b", "sha256": null}',
    ],
)
def test_foreign_file_is_refused(path, text):
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(UserError, match="line 4 is not of this program"):
        Manifest(path)


@pytest.mark.parametrize("added", ["\n", "  \r\n", "\0" * 30 + "\n"])
def test_an_empty_line_says_nothing(path, added):
    before = Manifest(path).lines
    text = path.read_text()
    path.write_text(added + text.replace("\n", "\r\n") + added)
    found = Manifest(path)
    assert found.lines == before
    found.tidy()
    assert path.read_text() == text


def test_sort(path):
    found = Manifest(path)
    for i in 9, 3, 1, 7:
        found.append(line(i))
    found.sort()
    assert lines_of(path) == [line(i) for i in (0, 1, 2, 3, 7, 9)]
    before = path.stat().mtime, path.read_bytes()
    Manifest(path).sort()
    assert (path.stat().mtime, path.read_bytes()) == before


def test_threads(path):
    found = Manifest(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(found.append, map(line, range(100, 400))))
    assert sorted(item["key"] for item in lines_of(path)[3:]) == [*map(str, range(100, 400))]


def test_full_disk_leaves_the_file_as_it_was(path):
    resource = pytest.importorskip("resource")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    found = Manifest(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        with pytest.raises(OSError):
            found.append(line(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_remote_manifest_is_uploaded_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "is_local", lambda path: False)
    monkeypatch.setattr(manifest, "UPLOAD_SECONDS", 1e9)
    path = epath.Path(tmp_path / "manifest.jsonl")
    found = Manifest(path)
    found.append(line(0))
    found.append(line(1))
    assert not path.exists()
    found.close()
    assert lines_of(path) == [line(0), line(1)]
    monkeypatch.setattr(manifest, "UPLOAD_SECONDS", -1)
    found.append(line(2))
    assert lines_of(path) == [line(0), line(1), line(2)]
    found._took = 60.0
    found.append(line(3))
    assert len(lines_of(path)) == 3
