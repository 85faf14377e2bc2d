"""InMemory changes nothing but the speed."""

import numpy as np
import pytest

from sana_jax.data.images import BadImage
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.memory import InMemory
from sana_jax.data.rejections import Budget
from sana_jax.data.sources import open_source
from sana_jax.data.transforms import ImageTransform
from tests.data import bad_files
from tests.data.test_folder import make

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


class Watched:
    def __init__(self, source):
        self.source, self.fingerprint, self.reads = source, source.fingerprint, 0

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads += 1
        return self.source[index]


@pytest.fixture
def source(tmp_path):
    unusable = {name: data for name, (data, _) in bad_files.unusable().items()}
    return Watched(open_source(str(make(tmp_path, bad_files.usable() | unusable))))


@pytest.mark.parametrize("max_bytes", [1 << 30, 20_000, 0])
def test_batches_and_counts_are_the_same(source, max_bytes):
    transform = ImageTransform(16, 16, crop="random", flip=True)

    def run(data):
        loader = TrainingLoader(data, transform, batch_size=9, seed=1, budget=Budget(1.0))
        batches = iter(loader)
        images = np.stack([next(batches)["image"] for _ in range(12)])
        return images, batches.get_state(), batches.counts.examples, loader.fingerprint

    (images, *rest), (kept_images, *kept_rest) = run(source), run(InMemory(source, max_bytes))
    np.testing.assert_array_equal(images, kept_images)
    assert rest == kept_rest


def test_what_is_kept_is_read_once_and_no_more_is_kept(source):
    size = 3 * bad_files.WIDTH * bad_files.HEIGHT
    usable, unusable = len(bad_files.usable()), len(bad_files.unusable())
    for kept in (0, 5, usable):
        memory = InMemory(source, kept * size)
        counts = [bad_files.counts_of(memory, ImageTransform(16, 16)) for _ in range(2)]
        assert counts[0] == counts[1] and counts[0].used == usable
        assert source.reads == usable + unusable + (usable - kept)
        source.reads = 0


def test_a_record_that_cannot_be_read_keeps_its_name(tmp_path):
    source = InMemory(open_source(str(make(tmp_path, {"b/a.png": b"", "b/a.json": "{"}))))
    for _ in range(2):
        with pytest.raises(BadImage, match="bad_caption: b/a.json") as caught:
            source[0]
        assert caught.value.key == "b/a.png"
