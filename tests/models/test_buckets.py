"""The tables of sizes against those that diffusers ships."""

import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.sana import pipeline_sana

from sana_jax.models import buckets
from sana_jax.runtime.errors import UserError


@pytest.mark.parametrize("base", [512, 1024, 2048, 4096])
def test_sampling_buckets_are_those_of_diffusers(base):
    theirs = getattr(pipeline_sana, f"ASPECT_RATIO_{base}_BIN")
    ours = {buckets.ratio(size): size for size in buckets.sampling_buckets(base)}
    assert ours == {float(k): (int(h), int(w)) for k, (h, w) in theirs.items()}
    for height in range(256, 2049, 184):
        for width in range(256, 2049, 104):
            classify = PixArtImageProcessor.classify_height_width_bin
            assert buckets.nearest(height, width, base) == classify(height, width, theirs)


@pytest.mark.parametrize("base", [512, 1024, 2048, 4096])
def test_training_buckets(base):
    sizes = buckets.training_buckets(base)
    assert len(sizes) == 40 and all(h % 32 == 0 == w % 32 for h, w in sizes)
    area = base * base
    assert all(0.85 * area < h * w < 1.05 * area for h, w in sizes)


def test_unknown_base():
    with pytest.raises(UserError, match="768"):
        buckets.training_buckets(768)
