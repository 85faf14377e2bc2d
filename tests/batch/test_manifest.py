"""The manifest survives a kill at any byte, a full disk and several threads."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from etils import epath

from sana_jax.batch import manifest
from sana_jax.batch.manifest import Manifest, key_of


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
        assert len(found.lines) == sum(end - 1 <= size for end in ends)  # whole without its end
        assert not found.strange
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
        "7" * 5000,
        "[" * 10**5,
        '{"file": "a.png", "key": "b"}',
        '{"file": ["a.png"], "key": "b", "sha256": "c"}',
        '{"file": "a.png", "key": 1, "sha256": "c"}',
        '{"file": "a.png", "key": "b", "sha256": null}',
        '{"file": "a.png", "key": "b", "sha256": "c", "more": ' + "[" * 99 + "]" * 99 + "}",
    ],
)
def test_a_line_of_another_shape_is_set_aside_and_the_others_are_read(path, text, capsys):
    before, whole = Manifest(path).lines, path.read_text()
    for _ in range(2):
        path.write_text(f"{text}\n{whole}{text}\n")
        found = Manifest(path)
        assert found.lines == before and found.strange == [text.encode()] * 2
        found.set_aside()
        found.tidy()
        assert path.read_text() == whole and not Manifest(path).strange
        told = capsys.readouterr().err
        assert "2 lines" in told and told.count("\n") == 1
    assert (path.parent / "manifest.jsonl.aside").read_text() == f"{text}\n" * 4


@pytest.mark.parametrize(
    "change, numbers",
    [
        (lambda text: text[9:], [1, 2]),
        (lambda text: b"\0" * 4096 + text[50:], [1, 2]),
        (lambda text: text[:50] + text, [0, 1, 2]),  # a torn line, and whole ones behind it
        (lambda text: text.replace(b"\n", b"\r"), [0, 1, 2]),
        (lambda text: text.replace(b"\n", b"") + b"\n", [0, 1, 2]),
        (lambda text: text.replace(b"\n", b"\0" * 7), [0, 1, 2]),
        (lambda text: b"\xef\xbb\xbf" + text, [0, 1, 2]),
        (lambda text: text.decode().encode("utf-16"), [0, 1, 2]),
        (lambda text: b"\xfe\xff" + text.decode().encode("utf-16-be"), [0, 1, 2]),
        (lambda text: text[:-1], [0, 1, 2]),
        (lambda text: text + text, [0, 1, 2]),
    ],
)
def test_what_is_whole_is_read_after_a_power_cut_and_another_system(path, change, numbers):
    path.write_bytes(change(path.read_bytes()))
    assert Manifest(path).lines == {line(i)["file"]: line(i) for i in numbers}


def test_an_object_in_a_line_does_not_cut_it(path):
    inside = line(5) | {"more": {"file": "x", "key": "y", "sha256": "z"}}
    Manifest(path).append(inside)
    found = Manifest(path)
    assert found.lines[line(5)["file"]] == inside and not found.strange


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
