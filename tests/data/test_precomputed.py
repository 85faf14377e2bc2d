"""The format of stored latents: what is written is read, and what is damaged is told."""

import json
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest

from sana_jax.data.images import BadImage
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.precomputed import INDEX, Precomputed, ShardWriter, finished_shard, write_json
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import StoredLatents
from sana_jax.runtime.errors import Retry, UserError
from tests.data import bad_files

SHAPES = [(4, 4, 3)] * 5 + [(2, 8, 3)] * 4 + [(4, 4, 3)] * 3
FACTOR = 0.5


def latents(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal(SHAPES[i], np.float32)


def write(folder, shards, **changes):
    """A folder with the records of each shard by number; those in `changes` are other ones."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number, numbers in enumerate(shards):
        with ShardWriter(folder, number) as writer:
            for i in numbers:
                record = {"key": f"r{i}", "captions": ["ä cat"], "scores": [1.5], "truth": ""}
                record |= {"latents": latents(i), "scaled": True} | changes.get(f"r{i}", {})
                writer.add(record)
            entries.append(writer.finish({"note": number}))
    index = {"format": 1, "split": "train", "scaling_factor": FACTOR, "text": None}
    write_json(folder / INDEX, index | {"shards": entries})
    return folder


@pytest.fixture
def folder(tmp_path):
    narrow = {"latents": latents(1).astype(ml_dtypes.bfloat16)}
    return write(tmp_path / "d", [range(0, 7), [], range(7, 12)], r1=narrow)


def test_records_come_back(folder):
    source = open_source(f"precomputed:{folder}")
    assert len(source) == 12 and source.shapes.tolist() == [list(s[:2]) for s in SHAPES]
    for i in range(12):
        record = source[i]
        assert record["key"] == f"r{i}" and record["latents"].dtype == np.float32
        expected = latents(i).astype(ml_dtypes.bfloat16 if i == 1 else np.float32)
        np.testing.assert_array_equal(record["latents"], expected.astype(np.float32))
    assert record["captions"] == ["ä cat"] and record["scores"] == [1.5]


def test_latents_that_are_not_scaled_are_scaled_on_reading(tmp_path):
    plain = {"latents": latents(0) / FACTOR, "scaled": False}
    source = Precomputed(write(tmp_path / "d", [range(2)], r0=plain))
    for i in range(2):
        np.testing.assert_allclose(source[i]["latents"], latents(i), rtol=1e-6)


def test_batches_have_one_shape(folder):
    source = Precomputed(folder)
    order = bucket_order(source, (), 4, seed=1)
    loader = TrainingLoader(source, StoredLatents(), batch_size=4, seed=1, order=order)
    shapes = [loader.batch(step)["latents"].shape for step in range(12)]
    assert set(shapes) == {(4, 4, 4, 3), (4, 2, 8, 3)}


def test_item_28_bad_latents_have_a_reason(tmp_path):
    nan = latents(0)
    nan[0, 0, 0] = np.nan
    changes = {"r0": {"latents": nan}}
    source = Precomputed(write(tmp_path / "d", [range(4)], **changes))
    source.shapes[3] = 5, 4  # as if written down wrongly
    for i in (0, 3):
        with pytest.raises(BadImage, match="bad_latents"):
            source[i]
    counts = bad_files.counts_of(source, StoredLatents())
    assert (counts.read, counts.used, counts.rejected["bad_latents"]) == (4, 2, 2)
    assert set(counts.examples) == {"r0", "r3"}


def test_a_flipped_bit_is_one_bad_record(folder):
    path = folder / "shard-00000.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(latents(2).tobytes()[:16]) + 4] ^= 1
    path.write_bytes(data)
    counts = bad_files.counts_of(Precomputed(folder), StoredLatents())
    assert (counts.used, counts.rejected["unreadable"]) == (11, 1)
    assert finished_shard(folder, 0) is None and finished_shard(folder, 2)["records"] == 5


def test_a_storage_that_was_away_is_no_bad_record(folder, monkeypatch):
    """ArrayRecord raises then what it raises for damage; no record is replaced for it."""
    source = Precomputed(folder)
    monkeypatch.setattr(source, "_data", Away())
    for index in 1, 6, 7, 11:  # of both shards, the first and last
        assert source[index]["key"] == f"r{index}"
    shutil.rmtree(folder)
    with pytest.raises(Retry, match="shard-00002.array_record cannot be read: No such file"):
        source[8]


class Away:
    """A reader whose files have gone stale."""

    def __getitem__(self, index):
        raise RuntimeError("read failed: Stale file handle")


def test_folders_that_cannot_be_read(tmp_path, folder):
    def fails(words, split="train"):
        with pytest.raises(UserError, match=words):
            open_source(f"precomputed:{folder}", split)

    fails("holds the split 'train', not 'test'", "test")
    shard = folder / "shard-00002.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    fails("shard-00002.array_record is missing or incomplete")
    shard.unlink()
    fails("shard-00002.array_record is missing or incomplete")
    for content in ("{", "[]", '{"format": 99}'):
        (folder / INDEX).write_text(content)
        fails("index.json")
    (folder / INDEX).unlink()
    fails("not precomputed, or not to the end")
    with pytest.raises(UserError, match="nowhere has no index.json"):
        Precomputed(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "field, values",
    [
        ("split", [None, 7]),
        ("scaling_factor", [None, "1", 0, []]),
        ("text", [7, {}, {"rows": "3"}, {"rows": 0}]),
        ("shards", [None, 7, {}, [7], [{}], []]),
        ("file", [None, 7]),
        ("bytes", [None, "9", 1]),
        ("records", [None, "7", 8, -7, 7.0]),
        ("runs", [None, 7, [], [7], [[4, 4]], [[4, 4, 8]], [[4, 4, -7], [4, 4, 14]]]),
    ],
)
def test_an_index_with_other_fields_is_named(folder, field, values):
    whole = (folder / INDEX).read_text()
    for value in (..., *values):
        index = json.loads(whole)
        place = index if field in index else index["shards"][0]
        place[field] = value
        if value is ...:
            del place[field]
        write_json(folder / INDEX, index)
        with pytest.raises(UserError, match=f"^{folder / INDEX} is damaged .*precompute"):
            Precomputed(folder)


def test_more_records_than_bytes_take_no_memory(folder):
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0] |= {"records": 10**12, "runs": [[4, 4, 10**12]]}
    write_json(folder / INDEX, index)
    with pytest.raises(UserError, match="index.json is damaged"):
        Precomputed(folder)


def test_a_damaged_shard_is_named(folder):
    path = folder / "shard-00002.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=f"^{path} is damaged .*precompute"):
        Precomputed(folder)


def test_the_fingerprint_is_that_of_the_shards(tmp_path):
    one, same = (Precomputed(write(tmp_path / name, [range(3)])) for name in "ab")
    assert one.fingerprint == same.fingerprint
    other = write(tmp_path / "c", [range(3)], r1={"captions": ["a dog"]})
    assert Precomputed(other).fingerprint != one.fingerprint


def test_a_shard_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 0) as writer:
        writer.add({"latents": latents(0), "scaled": True})
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and finished_shard(tmp_path, 0) is None
    (tmp_path / "shard-00000.json").write_text(json.dumps({"records": 1, "sha256": "0"}))
    assert finished_shard(tmp_path, 0) is None


def test_a_full_disk_is_worth_a_retry(tmp_path):
    """ArrayRecord tells of it when the file is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for error, words in (None, "shard-00000.tmp: .*File too large"), (KeyboardInterrupt, None):
        with pytest.raises(error or Retry, match=words), ShardWriter(tmp_path, 0) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                for i in range(12):
                    writer.add({"latents": latents(i), "scaled": True})
                if error:
                    raise error
                writer.finish({})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == []


def test_a_shard_whose_name_is_too_long_is_missing(folder):
    index = json.loads((folder / INDEX).read_text())
    index["shards"][0]["file"] = "x" * 300
    write_json(folder / INDEX, index)
    with pytest.raises(UserError, match="is missing or incomplete"):
        Precomputed(folder)
