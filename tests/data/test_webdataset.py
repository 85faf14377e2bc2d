"""Tars as a source: the index of wids, and what is wrong with either."""

import io
import json
import os
import tarfile

import pytest

from sana_jax.data.images import BadImage
from sana_jax.data.sources import check_apart, open_source
from sana_jax.data.webdataset import INDEX
from sana_jax.runtime.errors import Retry, UserError
from tests.data.bad_files import encode, picture
from tests.data.test_folder import PNG
from tests.data.test_tar_index import write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tar(path, **members):
    """A tar with members of this content, and names with dots for double underscores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def wids(root, **changes):
    """An index of the tars in a folder, as wids makes it."""
    lines = []
    for path in sorted(root.glob("*.tar")):
        about = {"url": path.name, "filesize": path.stat().st_size, "nsamples": 2}
        lines.append(about | changes.get(path.stem, {}))
    (root / INDEX).write_text(json.dumps({"wids_version": 1, "shardlist": lines}))
    return f"webdataset:{root}"


@pytest.fixture
def root(tmp_path):
    for shard in "ab":
        tar(tmp_path / f"data/{shard}.tar", x__jpg=PNG, x__json={"prompt": shard}, y__jpg=PNG)
    return tmp_path / "data"


def keys(source):
    return [source[i]["key"] for i in range(len(source))]


def test_an_index_says_which_tars_are_read_in_its_order(root, caplog):
    spec = wids(root)
    assert keys(open_source(spec)) == ["a.tar/x.jpg", "a.tar/y.jpg", "b.tar/x.jpg", "b.tar/y.jpg"]
    assert open_source(spec)[2]["captions"] == ["b"]
    index = json.loads((root / INDEX).read_text())
    index["shardlist"] = [{"url": f"/gone/{name}.tar", "nsamples": 2} for name in "ba"]
    (root / INDEX).write_text(json.dumps(index))
    for name in spec, f"{spec}/{INDEX}":
        assert keys(open_source(name))[:2] == ["b.tar/x.jpg", "b.tar/y.jpg"]
    index["shardlist"].pop()
    (root / INDEX).write_text(json.dumps(index))
    assert len(open_source(spec)) == 2 and "1 tars that no index lists" in caplog.text


def test_tars_beside_a_folder_with_an_index_are_read_too(root, tmp_path):
    more = tar(tmp_path / "more/c.tar", z__jpg=PNG)
    wids(root)
    for spec in f"{root}::{more}", f"{root}/{INDEX}::{more}", f"{tmp_path}/{{data,more}}":
        found = [key.rpartition("/")[2] for key in keys(open_source(f"webdataset:{spec}"))]
        assert found == ["x.jpg", "y.jpg", "x.jpg", "y.jpg", "z.jpg"], spec


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"a": {"url": "c.tar"}}, f"{INDEX} lists c.tar, which is not there; make the index anew"),
        ({"a": {"nsamples": 3}}, "a.tar has 2 samples, 3 in the index; make the index anew"),
        ({"b": {"filesize": 7}}, "b.tar has 10240 bytes, 7 in the index; make"),
    ],
)
def test_an_index_that_lists_what_is_not_there(root, changes, message):
    with pytest.raises(UserError, match=message):
        open_source(wids(root, **changes))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"shardlist": []}', '{"shardlist": [{}]}', '{"shardlist": 3}']
)
def test_an_index_that_is_none(root, text):
    (root / INDEX).write_text(text)
    with pytest.raises(UserError, match=f"{INDEX} is no index of wids: "):
        open_source(f"webdataset:{root}")


@pytest.mark.parametrize(
    "beside, captions",
    [
        ({"prompt": "a cat", "width": 3, "height": 4}, ["a cat"]),
        ({"caption": None, "url": "u"}, None),
        ({"captions": ["a", "b"], "scores": [1, 2]}, ["a", "b"]),
        ({"width": 3}, []),
        (b"{", None),
        (b"\xff\xfe", None),
    ],
)
def test_json_of_a_sample(tmp_path, beside, captions):
    source = open_source(f"webdataset:{tar(tmp_path / 'x.tar', k__png=PNG, k__json=beside)}")
    if captions is not None:
        assert source[0]["captions"] == captions
        return
    with pytest.raises(BadImage) as caught:
        source[0]
    assert (caught.value.reason, caught.value.key) == ("bad_caption", "x.tar/k.png")


def test_what_is_not_read_is_told_in_one_line(tmp_path, caplog):
    write(tmp_path / "data/x.tar", "a.png a.cls b.txt ._a.png b.cls")
    open_source(f"webdataset:{tmp_path / 'data'}")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(
        "data: 1 pictures; not read: *.cls (2), hidden files (1),"
        " members without a picture, such as x.tar/b.txt (1)"
    )


def test_tars_without_pictures(tmp_path):
    write(tmp_path / "data/x.tar", "a.txt b.cls")
    with pytest.raises(UserError, match="no picture in 1 tars"):
        open_source(f"webdataset:{tmp_path / 'data'}")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"there is no \*.tar in it"):
        open_source(f"webdataset:{tmp_path / 'none'}")


def test_the_fingerprint_follows_the_content_and_not_the_place(root, tmp_path):
    first = open_source(f"webdataset:{root}").fingerprint
    root.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert open_source(f"webdataset:{moved}").fingerprint == first
    (moved / "a_X.json").write_text('{"x": {"X": "a caption"}}')
    second = open_source(f"webdataset:{moved}").fingerprint
    tar(moved / "a.tar", x__jpg=PNG, x__json={"prompt": "c"}, y__jpg=encode(picture(1), "PNG"))
    assert len({first, second, open_source(f"webdataset:{moved}").fingerprint}) == 3


def test_the_same_tars_are_not_held_out(root):
    sources = [open_source(f"webdataset:{root}/{name}.tar") for name in ("{a,b}", "b")]
    with pytest.raises(UserError, match="have 2 records in common"):
        check_apart(*sources, "train", "test")


def test_a_tar_that_shrinks_or_goes_while_it_is_read(root):
    source = open_source(f"webdataset:{root}/a.tar")
    os.truncate(root / "a.tar", 600)
    with pytest.raises(BadImage, match="a.tar has become shorter") as caught:
        source[1]
    assert caught.value.key == "a.tar/y.jpg"
    (root / "a.tar").unlink()
    with pytest.raises(Retry, match="a.tar: No such file"):
        source[1]


def test_data_that_was_there_before_is_away(root):
    with pytest.raises(Retry, match="it was there before"):
        open_source(f"webdataset:{root / 'gone'}", resumes=True)
    with pytest.raises(Retry, match="it was there before"):
        open_source(wids(root, a={"url": "c.tar"}), resumes=True)


def test_a_folder_that_nobody_may_write_to(root):
    before = sorted(os.listdir(root))
    os.chmod(root, 0o555)
    try:
        assert len(open_source(f"webdataset:{root}")) == 4
    finally:
        os.chmod(root, 0o755)
    assert sorted(os.listdir(root)) == before
