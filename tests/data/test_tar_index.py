"""The index of a tar: what belongs together, what is wrong, and what is kept of it."""

import gzip
import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from etils import epath

from sana_jax.data import tar_index
from sana_jax.data.records import NoData
from sana_jax.data.tar_index import read_index
from sana_jax.runtime.errors import UserError

LONG = "d/" * 100 + "x" * 90 + ".jpg"  # more than a header holds


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/sana_jax/tars"


def write(path, names, kind=tarfile.PAX_FORMAT):
    """A tar whose members hold their own names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name in names.split() if isinstance(names, str) else names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            tar.addfile(info, io.BytesIO(name.encode()))
    return epath.Path(path)


def content(path, index, number, ending=None):
    place = index.place(number, ending)
    return place and path.read_bytes()[place[0] : sum(place)].decode()


def names(index):
    return [index.name(i) for i in range(len(index))]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_belong_together_by_all_of_their_name_but_the_ending(tmp_path, kind):
    """Wherever they are; in the order of the pictures."""
    members = "cat.002.jpg cat.001.txt ./a/b.c.PNG cat.001.jpg a/b.c.JSON cat.002.caption ä.webp"
    path = write(tmp_path / "x.tar", members, kind)
    index = read_index(path)
    assert names(index) == ["cat.002.jpg", "a/b.c.PNG", "cat.001.jpg", "ä.webp"]
    beside = [[content(path, index, i, ending) for ending in tar_index.BESIDE] for i in range(4)]
    assert beside == [
        [None, None, "cat.002.caption", None],
        ["a/b.c.JSON", None, None, None],
        [None, "cat.001.txt", None, None],
        [None] * 4,
    ]
    assert [content(path, index, i).removeprefix("./") for i in range(4)] == names(index)
    assert not index.orphans and not index.left_out


def test_names_that_are_long_or_no_unicode(tmp_path):
    path = write(tmp_path / "x.tar", [LONG, "b\udcff.jpg"[:1] + ".jpg"])
    assert names(read_index(path)) == [LONG, "b.jpg"]
    broken = write(tmp_path / "y.tar", "a.jpg")
    data = broken.read_bytes().replace(b"a.jpg", b"\xff.jpg")
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    broken.write_bytes(bytes(header) + data[512:])
    assert names(read_index(broken)) == ["\\udcff.jpg"]


def test_what_is_not_read_is_counted(tmp_path):
    members = "a.jpg b.txt .c.jpg __MACOSX/a.jpg readme a.cls ../e.jpg ._a.jpg"
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind in tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE:
            info = tarfile.TarInfo(f"{kind}.jpg")
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    index = read_index(path)
    assert names(index) == ["a.jpg"] and index.orphans == ["b.txt"]
    assert index.left_out == {
        "hidden files": 4,
        "names without an ending": 1,
        "*.cls": 1,
        "links and other members that are no plain files": 2,
    }


@pytest.mark.parametrize(
    "cut, message",
    [
        (0, "is empty; download or make it again"),
        (100, "cut short or damaged, at its beginning"),
        (512 * 3 + 100, "cut short or damaged, in or after 'b.jpg'"),
        (512 * 4, "after 'b.jpg'"),  # where two members meet: there is no end mark
        (512 * 5 + 3, "after 'c.jpg'"),
        (512 * 6, r"after 'c.jpg' \(there is no end mark\)"),
    ],
)
def test_item_29_a_tar_that_is_cut_short(tmp_path, cut, message):
    path = write(tmp_path / "x.tar", "a.jpg b.jpg c.jpg")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=message) as caught:
        read_index(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_header_that_is_damaged_is_not_the_end(tmp_path):
    path = write(tmp_path / "x.tar", "a.jpg b.jpg c.jpg")
    data = bytearray(path.read_bytes())
    data[1024 + 120] ^= 1  # in the header of b.jpg
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"after 'a.jpg' \(a header is no header\)"):
        read_index(path)


def test_what_is_no_tar(tmp_path):
    path = epath.Path(tmp_path / "x.tar")
    path.write_bytes(gzip.compress(bytes(2000)))
    with pytest.raises(UserError, match="x.tar is packed by gzip; unpack it"):
        read_index(path)
    path.write_text("<!DOCTYPE html>" + "x" * 1000)
    with pytest.raises(UserError, match="x.tar is cut short or damaged, at its beginning"):
        read_index(path)
    with pytest.raises(NoData, match="y.tar: there is no such file"):
        read_index(epath.Path(tmp_path / "y.tar"))


@pytest.mark.parametrize("members", ["a.jpg a.jpg", "a.jpg a.txt ./a.txt"])
def test_item_29_a_name_that_stands_twice(tmp_path, members):
    path = write(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match="x.tar: two members are called 'a.(jpg|txt)'; give every"):
        read_index(path)


def same(one, other):
    arrays = ("names", "ends", "places", "shapes")
    assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    rest = ("orphans", "left_out", "samples", "digest")
    assert [getattr(one, name) for name in rest] == [getattr(other, name) for name in rest]


def test_an_index_is_kept_until_the_tar_changes(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "x.tar", "a.jpg a.txt b.txt c.png readme")
    first = read_index(path)
    (kept,) = cache.iterdir()
    with monkeypatch.context() as context:
        context.setattr(tar_index, "_build", None)
        same(read_index(path), first)
    # A bit that flips in what is kept, a file cut short, and one that a killed process left.
    whole = kept.read_bytes()
    for damage in whole[:-1], b"", bytes([*whole[:200], whole[200] ^ 1, *whole[201:]]):
        kept.write_bytes(damage)
        (cache / f"{kept.name}.0.part").write_bytes(b"half")
        same(read_index(path), first)
        assert kept.read_bytes() == whole
    changed = write(tmp_path / "x.tar", "a.jpg a.txt b.txt d.png readme")
    assert changed.stat().length == len(path.read_bytes())
    assert names(read_index(path)) == ["a.jpg", "d.png"]


def test_nothing_is_written_beside_the_tar_and_nothing_has_to_be_kept(tmp_path, cache, caplog):
    path = write(tmp_path / "data/x.tar", "a.jpg")
    cache.parent.parent.write_text("a file in the way")
    assert names(read_index(path)) == ["a.jpg"]
    assert "the index of a tar is not kept" in caplog.text
    assert os.listdir(tmp_path / "data") == ["x.tar"]


@pytest.mark.slow  # ten processes are killed
def test_kill_9_while_an_index_is_made(tmp_path, cache, monkeypatch):
    path = write(
        tmp_path / "x.tar", [f"{i // 2}.{'jpg txt'.split()[i % 2]}" for i in range(20_000)]
    )
    script = "import sys; from etils import epath; from sana_jax.data.tar_index import read_index;"
    command = [sys.executable, "-c", script + "read_index(epath.Path(sys.argv[1]))", str(path)]
    for moment in np.random.default_rng(0).uniform(1, 4, 10):
        process = subprocess.Popen(command)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    again = read_index(path)
    (kept,) = (each for each in cache.iterdir() if each.suffix == ".npz")
    after = kept.read_bytes()
    kept.unlink()
    same(read_index(path), again)
    assert kept.read_bytes() == after
