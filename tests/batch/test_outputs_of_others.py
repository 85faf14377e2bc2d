"""Pictures in an output folder that this run did not draw are refused, or replaced if asked to."""

import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from sana_jax.batch.outputs import OutputFolder
from sana_jax.runtime.errors import UserError
from tests.batch.test_outputs import (
    NOTES,
    contents,
    lines,
    lose_the_manifest,
    run,
    wanted,
)


@pytest.fixture
def out(tmp_path):
    run(tmp_path)
    return tmp_path


@pytest.mark.parametrize("found", ["line and picture", "picture", "line", "foreign", "junk"])
def test_other_pictures_are_refused_or_replaced(out, found):
    if found in ("picture", "foreign", "junk"):
        (out / "manifest.jsonl").unlink()
    if found == "foreign":
        Image.new("RGB", (8, 8)).save(out / "000001_1.png")
    if found == "junk":
        (out / "000001_1.png").write_bytes(b"")
    if found == "line":
        for file in wanted():
            (out / file).unlink()
    before = contents(out)
    with pytest.raises(UserError, match=r"00000[01]_[01].png.*--overwrite"):
        run(out, wanted(prompt="b"))
    assert contents(out) == before
    assert len(run(out, wanted(prompt="b"), overwrite=True)) == 3
    assert [line["prompt"] for line in lines(out)] == ["b"] * 3


def test_only_the_first_is_named(out):
    with pytest.raises(UserError) as error:
        run(out, wanted(prompt="b"))
    assert "000000_0.png and 2 more are there" in str(error.value)


@pytest.mark.parametrize("harm", [lambda out: None, lose_the_manifest])
def test_what_differs_is_named(out, harm):
    harm(out)
    changed = {f: {**s, "num_steps": 9, "tile": (8, 4)} for f, s in wanted().items()}
    with pytest.raises(UserError) as error:
        run(out, changed)
    words = "of other settings (num_steps 4 -> 9, tile unknown -> [8, 4]); use another --out"
    assert words in str(error.value)


def test_retouched_picture_is_the_users(out):
    """Also where the editor kept the texts of the header."""
    with Image.open(out / "000001_1.png") as image:
        info = PngInfo()
        for name, text in image.text.items():
            info.add_itxt(name, text)
        image.transpose(Image.Transpose.ROTATE_180).save(out / "000001_1.png", pnginfo=info)
    before = contents(out)
    with pytest.raises(UserError, match="000001_1.png is there, changed since it was drawn; use"):
        run(out)
    assert contents(out) == before
    assert run(out, overwrite=True) == {"000001_1.png"}


def test_a_picture_of_another_size_is_the_users(out):
    """Whatever its header says: it is not what these settings draw."""
    lose_the_manifest(out)
    with Image.open(out / "000001_1.png") as image:
        info = PngInfo()
        for name, text in image.text.items():
            info.add_itxt(name, text)
        image.resize((8, 8)).save(out / "000001_1.png", pnginfo=info)
    before = contents(out)
    with pytest.raises(UserError, match="000001_1.png is there, changed since it was drawn; use"):
        run(out)
    assert contents(out) == before
    assert run(out, overwrite=True) == {"000001_1.png"}


def test_pictures_are_not_decoded_to_look_at_them(out, monkeypatch):
    """A few of the largest fill any memory."""
    lose_the_manifest(out)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert run(out) == set()
    Image.new("1", (20_000, 20_000)).save(out / "000001_1.png")
    with pytest.raises(UserError, match="000001_1.png is there"):
        run(out)


@pytest.mark.parametrize("text", ["my notes\n", "{}\n", "my notes", '{"prompt": "a"}\n' * 3])
def test_a_manifest_of_another_is_refused_and_kept(tmp_path, text):
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(UserError, match="manifest.jsonl is not of this program; move the file"):
        run(tmp_path)
    assert contents(tmp_path) == {"manifest.jsonl": text.encode()}
    run(tmp_path, overwrite=True)
    assert (tmp_path / "manifest.jsonl.aside").read_text().strip() == text.strip()
    assert len(lines(tmp_path)) == 3


def test_failing_replacement_loses_no_line(out):
    before = contents(out)
    with pytest.raises(UserError, match="stop"):
        with OutputFolder(str(out), wanted(prompt="b"), NOTES, overwrite=True):
            raise UserError("stop")
    assert contents(out) == before
    run(out, wanted(prompt="b"), count=1, overwrite=True)
    assert [line["prompt"] for line in lines(out)] == ["b", "a", "a"]


def test_replacement_without_its_line_is_done(out):
    """The run was killed after it wrote the picture, and before it wrote the line."""
    old = (out / "manifest.jsonl").read_bytes()
    run(out, wanted(prompt="b"), overwrite=True)
    after = contents(out)
    (out / "manifest.jsonl").write_bytes(old)
    assert run(out, wanted(prompt="b")) == set()
    assert contents(out) == after


def test_grid_of_another_is_refused(out):
    for key in {}, {"sana_jax": "0" * 64}:  # the user's, and a picture under another name
        info = PngInfo()
        for name, text in key.items():
            info.add_itxt(name, text)
        Image.new("RGB", (8, 8)).save(out / "grid.png", pnginfo=info)
        before = contents(out)
        with pytest.raises(UserError, match="grid.png is not of this program.*--overwrite"):
            with OutputFolder(str(out), wanted(), NOTES, grid=True):
                pytest.fail("something would be drawn")
        assert contents(out) == before
        assert run(out) == set()  # which asks for no grid
    with OutputFolder(str(out), wanted(), NOTES, overwrite=True, grid=True) as folder:
        folder.write_grid()
    with OutputFolder(str(out), wanted(), NOTES, grid=True) as folder:
        folder.write_grid()
    assert contents(out)["grid.png"] != before["grid.png"]
