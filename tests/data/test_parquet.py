"""Parquet with pictures: columns by their names, and what is wrong with a file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sana_jax.data import parquet
from sana_jax.data.images import BadImage
from sana_jax.data.sources import check_apart, open_source
from sana_jax.runtime.errors import Retry, UserError
from tests.data.bad_files import encode, picture

PNGS = [encode(picture(i), "PNG") for i in range(5)]


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return f"parquet:{path}"


@pytest.mark.parametrize(
    "columns, captions",
    [
        ({}, []),
        ({"text": ["a cat"] * 5, "width": [3] * 5}, ["a cat"]),
        ({"caption": [" "] * 5, "text": ["b"] * 5}, []),
        ({"captions": [["a", "b"]] * 5, "caption": ["c"] * 5}, ["a", "b"]),
        ({"caption": [None] * 5}, []),
        ({"text": [7] * 5, "prompt": ["a"] * 5}, ["a"]),
    ],
)
@pytest.mark.parametrize("name", ["image", "jpg", "some_bytes"])
def test_columns_by_their_names(tmp_path, name, columns, captions):
    source = open_source(write(tmp_path / "x.parquet", **{name: PNGS}, **columns))
    assert [source[i]["image"] for i in range(len(source))] == PNGS
    assert source[0]["captions"] == captions and source[0]["key"] == "x.parquet/0"


def test_names_scores_and_truth(tmp_path):
    truth = json.dumps({"captions": [{"style": "s"}, {"style": "t"}]})
    columns = {"image_id": [*"abcde"], "captions": [["a", "b"]] * 5, "scores": [[1.0, 2.0]] * 5}
    source = open_source(write(tmp_path / "x.parquet", img=PNGS, truth=[truth] * 5, **columns))
    assert source[3] == {
        "key": "x.parquet/3/d",
        "image": PNGS[3],
        "captions": ["a", "b"],
        "scores": [1.0, 2.0],
        "truth": truth,
    }
    pictures = [{"bytes": png, "path": "/home/me/a.b.png"} for png in PNGS]
    source = open_source(write(tmp_path / "y.parquet", image=pictures, id=[*"abcde"]))
    assert [source[i]["key"] for i in (0, 4)] == [f"y.parquet/{i}/home/me/a.b.png" for i in (0, 4)]


def test_rows_that_cannot_be_used_are_named(tmp_path):
    pictures = [{"bytes": png, "path": "p"} for png in PNGS]
    pictures[1] = {"bytes": None, "path": "/home/me/b.png"}
    pictures[2] = None
    scores = [[1.0]] * 4 + [[1.0, 2.0]]
    spec = write(tmp_path / "x.parquet", image=pictures, captions=[["a"]] * 5, scores=scores)
    source = open_source(spec)
    for row, key, why in [
        (1, "x.parquet/1/home/me/b.png", "it has no picture, only its path"),
        (2, "x.parquet/2", "it has no picture"),
        (4, "x.parquet/4/p", "its row: 1 captions but 2 scores"),
    ]:
        with pytest.raises(BadImage, match=why) as caught:
            source[row]
        assert caught.value.key == key
    assert source[3]["captions"] == ["a"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"url": ["u"], "text": ["t"]}, "no column with the bytes of pictures, only url, text"),
        ({"image": ["a.png"]}, "no column with the bytes of pictures, only image"),
        ({"image": [{"bytes": None, "path": "a"}]}, "no column with the bytes of"),
        ({"image": pa.array([None], pa.binary())}, "has the paths of pictures and not their bytes"),
        ({"image": pa.array([], pa.binary())}, "its 1 files have no rows"),
    ],
)
def test_parquet_without_pictures(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        open_source(write(tmp_path / "x.parquet", **columns))


def test_what_datasets_writes_of_paths_has_no_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "a.png").write_bytes(PNGS[0])
    data = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    data = data.cast_column("image", datasets.Image())
    data.to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match="has the paths of pictures and not their bytes; .*embed_"):
        open_source(f"parquet:{tmp_path / 'x.parquet'}")
    embedded = data.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
    embedded.to_parquet(str(tmp_path / "y.parquet"))
    (record,) = [open_source(f"parquet:{tmp_path / 'y.parquet'}")[0]]
    assert (record["key"], record["image"]) == ("y.parquet/0/a.png", PNGS[0])


def test_files_that_are_damaged(tmp_path):
    spec = write(tmp_path / "x.parquet", image=PNGS)
    whole = (tmp_path / "x.parquet").read_bytes()
    for damage in whole[:-1], whole[: len(whole) // 2], b"", b"<html>" * 99:
        (tmp_path / "x.parquet").write_bytes(damage)
        with pytest.raises(UserError, match="x.parquet is cut short or damaged .*download or make"):
            open_source(spec)
    torn = bytearray(whole)
    torn[4:40] = bytes(36)  # the first page's header
    (tmp_path / "x.parquet").write_bytes(torn)
    source = open_source(spec)
    with pytest.raises(BadImage, match="unreadable: its row group is damaged") as caught:
        source[1]
    assert caught.value.key == "x.parquet/1" and source[2]["image"] == PNGS[2]


def test_files_of_other_columns(tmp_path):
    write(tmp_path / "a.parquet", image=PNGS)
    write(tmp_path / "b.parquet", picture=PNGS)
    with pytest.raises(UserError, match="b.parquet has no column 'image', which a.parquet has"):
        open_source(f"parquet:{tmp_path}")
    write(tmp_path / "b.parquet", image=["a.png"], jpg=PNGS[:1])
    with pytest.raises(UserError, match="b.parquet has no column with the bytes of .*only image"):
        open_source(f"parquet:{tmp_path}")


def test_a_row_group_of_more_bytes_than_one_array_holds(tmp_path, monkeypatch):
    source = parquet.Parquet(write(tmp_path / "x.parquet", image=PNGS).partition(":")[2])
    size = 3 << 29
    zeros = pa.py_buffer(np.zeros(size, np.uint8))  # which take no memory until they are read
    ends = pa.py_buffer(np.array([0, size], np.int32))
    part = pa.Array.from_buffers(pa.binary(), 1, [None, ends, zeros])
    table = pa.table({"image": pa.chunked_array([part, part])})
    monkeypatch.setattr(source, "_table", lambda group: table)
    source._check_pictures("x")


def test_several_files_splits_and_what_they_have_in_common(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", image=PNGS[:3])
    write(tmp_path / "data/train-00001-of-00002.parquet", image=PNGS[3:])
    write(tmp_path / "data/test-00000-of-00001.parquet", image=PNGS[:1])
    train, test = (open_source(f"parquet:{tmp_path}", split) for split in ("train", "test"))
    assert [train[i]["image"] for i in range(5)] == PNGS and len(test) == 1
    assert train[4]["key"] == "data/train-00001-of-00002.parquet/1"
    check_apart(train, test, "train", "test")
    with pytest.raises(UserError, match="have 5 records in common"):
        check_apart(train, train, "train", "test")


def test_few_row_groups_are_kept_and_large_ones_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "LARGE_GROUP", 1)
    monkeypatch.setattr(parquet, "KEPT_BYTES", 2 * len(PNGS[0]))
    write(tmp_path / "x.parquet", image=PNGS)
    source = parquet.Parquet(str(tmp_path / "x.parquet"))
    assert "which a shuffle reads for every row" in caplog.text
    for row in (0, 4, 2, 0, 3):
        assert source[row]["image"] == PNGS[row]
    assert len(source._kept) == 1


def test_a_file_that_goes_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT_BYTES", 0)
    source = open_source(write(tmp_path / "x.parquet", image=PNGS))
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(Retry, match="x.parquet: No such file"):
        source[0]
    with pytest.raises(Retry, match="it was there before"):
        open_source(f"parquet:{tmp_path}", resumes=True)
