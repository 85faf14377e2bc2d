"""What a folder of pictures holds after runs that ended in every way."""

import contextlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from sana_jax.batch import manifest, outputs
from sana_jax.batch.manifest import key_of
from sana_jax.batch.outputs import OutputFolder
from sana_jax.runtime import files as whole_files
from sana_jax.runtime.errors import Retry, UserError

NOTES = {"checkpoint": "a name"}
STRANGE = "../../etc/x\0\n🎨 שלום \ud83c end"


def settings(i: int, prompt: str = "a") -> dict:
    size = {"height": 32, "width": 48}
    return {"prompt": prompt, "negative_prompt": "", "seed": i, "num_steps": 4, **size}


def wanted(count=3, prompt="a") -> dict[str, dict]:
    return {f"{i:06d}_{i}.png": settings(i, prompt) for i in range(count)}


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8)


def run(path, want=None, count=None, overwrite=False, **more) -> set[str]:
    """Draws what is missing, `count` pictures at most, and returns what was missing."""
    with OutputFolder(str(path), want or wanted(), NOTES, overwrite, **more) as out:
        missing = out.missing
        for file in sorted(missing)[:count]:
            out.save(file, pixels(int(file[:6])))
    return missing


def files(path) -> set[str]:
    return {p.name for p in path.iterdir()}


def lines(path) -> list[dict]:
    return [json.loads(x) for x in (path / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "deep" / "out"
    run(path)
    return path


def contents(path) -> dict:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def test_first_run(out):
    assert files(out) == {*wanted(), "manifest.jsonl"}
    for line, (file, want) in zip(lines(out), wanted().items(), strict=True):
        assert line == {
            "file": file,
            **want,
            **NOTES,
            "sha256": line["sha256"],
            "key": key_of(want),
        }
        with Image.open(out / file) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels(want["seed"]))


def test_second_run_has_nothing_to_do(out):
    before = contents(out)
    assert run(out) == set()
    assert contents(out) == before


def test_longer_list_continues(out):
    assert run(out, wanted(5)) == {"000003_3.png", "000004_4.png"}
    assert len(lines(out)) == 5


def test_header_of_a_picture(tmp_path):
    run(tmp_path, {"000000_0.png": settings(0, STRANGE)})
    with Image.open(tmp_path / "000000_0.png") as image:
        texts = image.text
    assert texts["prompt"] == "../../etc/x\n🎨 שלום ? end"
    assert texts["seed"] == "0" and texts["negative_prompt"] == ""
    assert json.loads(texts["settings"]) == settings(0, STRANGE)
    assert texts["sana_jax"] == key_of(settings(0, STRANGE))
    assert lines(tmp_path)[0]["prompt"] == STRANGE
    assert run(tmp_path, {"000000_0.png": settings(0, STRANGE)}) == set()


def test_long_prompt(tmp_path):
    want = {"000000_0.png": settings(0, "é🎨" * 500_000)}
    run(tmp_path, want)
    (tmp_path / "manifest.jsonl").unlink()
    assert run(tmp_path, want) == set()


def lose_the_line(out):
    (out / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines(out)[:-1]))


def tear_the_line(out):
    text = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(text[:-20])


def lose_the_manifest(out):
    (out / "manifest.jsonl").unlink()


def lose_the_picture(out):
    (out / "000002_2.png").unlink()


def damage_the_picture(out):
    content = bytearray((out / "000002_2.png").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "000002_2.png").write_bytes(content)


def tear_the_picture(out):
    (out / "000002_2.png").write_bytes((out / "000002_2.png").read_bytes()[:-300])


def tear_the_picture_without_a_line(out):
    tear_the_picture(out)
    lose_the_line(out)


def tear_the_first_line(out):
    text = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(bytes(100) + text[100:])


def fill_the_manifest_with_nuls(out):
    size = (out / "manifest.jsonl").stat().st_size
    (out / "manifest.jsonl").write_bytes(bytes(size))


def repeat_the_manifest_as_windows_does(out):
    text = (out / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_bytes((text + text).replace("\n", "\r\n").encode("utf-16"))


def change_a_hash(out, name="sha256"):
    changed = lines(out)
    changed[1][name] = changed[1][name][:-1] + "~"
    (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def change_a_key(out):
    change_a_hash(out, "key")


def change_a_hash_and_lose_the_picture(out):
    change_a_hash(out)
    (out / "000001_1.png").unlink()


def change_a_key_and_lose_the_picture(out):
    change_a_key(out)
    (out / "000001_1.png").unlink()


def leave_parts(out):
    for name in "000002_2.png.part", "manifest.jsonl.part", "probe.part":
        (out / name).write_bytes(b"half")


@pytest.mark.parametrize(
    "harm, redrawn",
    [
        (lose_the_line, 0),
        (tear_the_line, 0),
        (lose_the_manifest, 0),
        (tear_the_first_line, 0),
        (fill_the_manifest_with_nuls, 0),
        (repeat_the_manifest_as_windows_does, 0),
        (change_a_hash, 0),
        (change_a_key, 0),
        (change_a_hash_and_lose_the_picture, 1),
        (change_a_key_and_lose_the_picture, 1),
        (lose_the_picture, 1),
        (damage_the_picture, 1),
        (tear_the_picture, 1),
        (tear_the_picture_without_a_line, 1),
        (leave_parts, 0),
    ],
)
def test_next_run_mends(out, harm, redrawn):
    before = contents(out)
    harm(out)
    assert len(run(out)) == redrawn
    after = contents(out)
    aside = after.pop("manifest.jsonl.aside", None)
    assert after == before
    assert (aside is not None) == (harm is tear_the_first_line)


def test_lines_are_in_the_order_of_the_pictures(tmp_path):
    with OutputFolder(str(tmp_path), wanted(4), NOTES) as out:
        for file in sorted(wanted(4), reverse=True):
            out.save(file, pixels(0))
        assert [line["seed"] for line in lines(tmp_path)] == [3, 2, 1, 0]
    assert [line["seed"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_replacing_that_is_cut_short(out):
    """What is left of the old pictures is not taken for the new ones, nor overwritten unasked."""
    run(out, wanted(prompt="b"), count=1, overwrite=True)
    with pytest.raises(UserError, match="000001_1.png and 1 more are there"):
        run(out, wanted(prompt="b"))
    assert run(out, wanted(prompt="b"), overwrite=True) == {"000001_1.png", "000002_2.png"}
    assert len(lines(out)) == 3


def test_files_of_others_stay(out):
    for name in "notes.txt", "film.part", "000900_900.png":
        (out / name).write_bytes(b"x")
    before = contents(out)
    run(out)
    assert contents(out) == before


def test_folder_without_a_picture_goes_away(tmp_path):
    with OutputFolder(str(tmp_path / "a" / "b"), wanted(), NOTES) as out:
        out.probe(10**6)
        assert files(tmp_path / "a" / "b") == {".sana_jax.lock"}
    assert files(tmp_path) == set()
    with pytest.raises(UserError, match="stop"):
        with OutputFolder(str(tmp_path / "a" / "b"), wanted(), NOTES):
            raise UserError("stop")
    assert files(tmp_path) == set()


def test_second_writer_is_refused(out):
    with OutputFolder(str(out), wanted(), NOTES):
        with pytest.raises(UserError, match=f"another run .pid {os.getpid()}, .*--out={out}"):
            run(out)
    assert run(out) == set()
    assert ".sana_jax.lock" not in files(out)


@contextlib.contextmanager
def small_disk(size: int):
    """A disk that is full after that many bytes of a file.

    The limit is the process's own, so it ends with the block: pytest may write to a log.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_found_by_the_probe(tmp_path):
    with pytest.raises(UserError, match="--out=.*new: File too large$"):
        with OutputFolder(str(tmp_path / "new"), wanted(), NOTES) as out, small_disk(1000):
            out.probe(3 * 32 * 48)
    assert files(tmp_path) == set()


def test_full_disk_later(tmp_path):
    run(tmp_path, count=1)
    before = contents(tmp_path)
    message = "File too large; 1 of 3 images are done, and the same"
    with pytest.raises(Retry, match=message), small_disk(1000):
        run(tmp_path)
    assert contents(tmp_path) == before


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in tmp_path / "file", tmp_path / "file" / "deeper", "/proc/nothing":
        with pytest.raises(UserError, match=f"--out={path}: "):
            run(path)


@pytest.mark.parametrize("name", ["000000_0.png", "manifest.jsonl", "grid.png", "probe.part"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "make, kind",
    [
        (os.mkdir, "a folder"),
        (os.mkfifo, "a pipe"),
        (lambda path: os.symlink("nothing", path), "a link that leads to nothing"),
        (lambda path: os.symlink(path, path), "a link that leads to nothing"),
        (lambda path: os.symlink("/dev/null", path), "a device"),
    ],
)
def test_what_is_no_file_is_named_and_stays(tmp_path, name, overwrite, make, kind):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{tmp_path / name} is {kind}, where"):
        run(tmp_path, overwrite=overwrite, grid=True)
    assert files(tmp_path) == {name}


def test_pictures_behind_links_are_done(out, tmp_path):
    """As some programs keep large files; so may the folder be one."""
    os.rename(out / "000001_1.png", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", out / "000001_1.png")
    os.symlink(out, tmp_path / "link")
    assert run(tmp_path / "link") == set()
    lose_the_manifest(out)
    assert run(f"{tmp_path / 'link'}/") == set() and len(lines(out)) == 3


def test_a_file_that_cannot_be_read_is_named(out, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied", str(out / "000001_1.png"))

    monkeypatch.setattr(outputs, "_sha256_of", denied)
    with pytest.raises(UserError, match=f"--out={out}: 000001_1.png: Permission denied$"):
        run(out)


def test_further_fields_stand_in_the_lines_and_decide_nothing(out):
    extras = {"000001_1.png": {"tag": "two", "include": [{"class": "cat", "count": 2}]}}
    before = lines(out)
    assert run(out, extras=extras) == set()
    assert lines(out) == [before[0], before[1] | extras["000001_1.png"], before[2]]
    lose_the_manifest(out)
    assert run(out, extras=extras) == set()
    assert lines(out) == [before[0], before[1] | extras["000001_1.png"], before[2]]


@pytest.mark.parametrize("count, side", [(1, 1), (5, 3), (70, 8)])
def test_grid(tmp_path, count, side):
    with OutputFolder(str(tmp_path), wanted(count), NOTES) as out:
        for i, file in enumerate(wanted(count)):
            out.save(file, np.full((512, 256, 3), i, np.uint8))
        out.write_grid()
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (side * 128, -(-min(count, 64) // side) * 256)
        values = np.asarray(sheet)[128::256, 64::128, 0]
    shown = values.ravel()[: min(count, 64)]
    np.testing.assert_array_equal(shown, np.arange(len(shown)))
    assert "grid.png" not in {line["file"] for line in lines(tmp_path)}


def test_remote_storage_has_errors_of_its_own(tmp_path, monkeypatch):
    class HttpError(Exception):
        """As gcsfs raises them."""

    def away(path, content):
        raise HttpError("503")

    monkeypatch.setattr(outputs, "write_atomically", away)
    with pytest.raises(HttpError):
        run(tmp_path)
    for module in manifest, outputs:
        monkeypatch.setattr(module, "is_local", lambda path: False)
    with pytest.raises(Retry, match="--out=.*: 503"):
        run(tmp_path)


def test_what_ends_a_run_goes_before_an_error_of_closing(tmp_path, monkeypatch):
    def away(self):
        raise OSError(107, "Transport endpoint is not connected")

    for module in manifest, outputs:
        monkeypatch.setattr(module, "is_local", lambda path: False)
    with pytest.raises(KeyboardInterrupt):
        with OutputFolder(str(tmp_path), wanted(), NOTES):
            monkeypatch.setattr(manifest.Manifest, "tidy", away)
            raise KeyboardInterrupt


def test_remote_folder(tmp_path, monkeypatch):
    """Without rename, append and lock: as object stores are."""
    for module in whole_files, manifest, outputs:
        monkeypatch.setattr(module, "is_local", lambda path: False)
    monkeypatch.setattr(type(outputs.epath.Path()), "replace", None)
    monkeypatch.setattr(outputs, "locked", None)
    run(tmp_path, count=2)
    assert files(tmp_path) == {"000000_0.png", "000001_1.png", "manifest.jsonl"}
    before = contents(tmp_path)
    (tmp_path / "manifest.jsonl").unlink()  # killed before it was uploaded
    run(tmp_path, count=0)
    assert contents(tmp_path) == before
    assert run(tmp_path) == {"000002_2.png"}
    assert len(lines(tmp_path)) == 3


def test_pictures_of_any_size(out, monkeypatch):
    """Pillow takes large ones for an attack; these are as large as the user has asked for."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (out / "manifest.jsonl").unlink()  # so that they are opened
    with OutputFolder(str(out), wanted(), NOTES, grid=True) as folder:
        assert not folder.missing
        folder.write_grid()
    assert Image.MAX_IMAGE_PIXELS == 100
