"""The same pictures as a folder, tars, tars with an index, and Parquet: the same training."""

import numpy as np
import pytest

from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import BucketTransform, ImageTransform
from tests.data import bad_files, formats

TABLE = ((16, 24), (24, 16), (24, 24))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return formats.all_of_them(tmp_path_factory.mktemp("formats"), 40)


@pytest.fixture(scope="module")
def sources(names):
    return {kind: open_source(name) for kind, name in names.items()}


def test_the_records_are_the_same_in_the_same_order(sources):
    folder = [sources["folder"][i] for i in range(len(sources["folder"]))]
    assert len(folder) == 43 and sum(not record["captions"] for record in folder) > 3
    for kind, source in sources.items():
        records = [source[i] for i in range(len(source))]
        shown = [record | {"key": formats.path_of(kind, record["key"])} for record in records]
        assert shown == folder, kind
        assert len({record["key"] for record in records}) == len(records)
        with pytest.raises(IndexError):
            source[len(source)]


def test_what_cannot_be_used_is_the_same_and_named(sources):
    for kind, source in sources.items():
        counts = bad_files.counts_of(source, ImageTransform(24, 24))
        assert counts.read == len(source) == counts.used + sum(counts.rejected.values())
        named = {formats.path_of(kind, key): why for key, why in counts.examples.items()}
        assert {"half.jpg", "page.jpg", "one_pixel.png"} <= set(named)
        assert named["half.jpg"].startswith("truncated")
    for kind in "folder", "tars", "indexed":
        orphans = [formats.path_of(kind, name) for name in sources[kind].orphans]
        assert orphans == ["nothing.here.json"]


@pytest.mark.parametrize("aspects", [False, True])
def test_batches_are_the_same_to_the_bit(sources, aspects):
    def batches(source):
        transform = ImageTransform(24, 24, crop="random", flip=True, upscale=True)
        order = None
        if aspects:
            transform = BucketTransform(TABLE, "random", True)
            order = bucket_order(source, TABLE, 4)
        loader = TrainingLoader(source, transform, batch_size=4, order=order)
        return [loader.batch(step)["image"] for step in range(8)]

    expected = batches(sources["folder"])
    for kind in "tars", "indexed", "parquet":
        found = batches(sources[kind])
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True)), kind


@pytest.mark.slow  # 2,000 records
def test_500_pictures_are_the_same_in_all_four(tmp_path):
    folder = None
    for kind, name in formats.all_of_them(tmp_path, 500).items():
        source = open_source(name)
        records = [source[i] for i in range(len(source))]
        shown = [record | {"key": formats.path_of(kind, record["key"])} for record in records]
        folder = folder or shown
        assert shown == folder and len(folder) == 503, kind
        counts = bad_files.counts_of(source, ImageTransform(24, 24))
        assert counts.used == 500 and counts.read == 503, kind
