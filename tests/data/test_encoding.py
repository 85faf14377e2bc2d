"""The flags of precompute, as they are sent to other machines."""

import pickle

import pytest

from sana_jax.checkpoints import native
from sana_jax.data.encoding import Encoding
from sana_jax.data.transforms import BucketTransform, ImageTransform
from sana_jax.runtime.errors import UserError
from tests import mini
from tests.data.test_folder import PNG, make


def test_an_encoding_is_plain_and_compares():
    one = Encoding("sana", "photos", size=512, tile="auto")
    assert pickle.loads(pickle.dumps(one)) == one and hash(one) == hash(eval(repr(one)))
    assert isinstance(one.image(), ImageTransform)
    assert isinstance(Encoding("sana", "photos", buckets=512).image(), BucketTransform)


def test_aspect_ratios_are_kept_at_the_size_that_the_checkpoint_draws(tmp_path):
    mini.save(tmp_path / "sana", sample_size=512 // mini.FACTOR)
    given = str(tmp_path / "sana"), str(make(tmp_path / "photos", {"a.png": PNG}))
    assert Encoding(*given).open().settings() == Encoding(*given, buckets=512).open().settings()
    native.save(mini.alone(tmp_path / "sana"), tmp_path / "alone")
    with pytest.raises(UserError, match="give --size or --buckets: .*alone has no transformer"):
        Encoding(str(tmp_path / "alone"), given[1]).open()


def test_tiles_by_name_and_by_numbers():
    assert Encoding("sana", "photos", size=512, tile="auto").tile_of(32) is None
    large = Encoding("sana", "photos", size=4096, tile="auto").tile_of(32)
    assert large is not None and large[0] > large[1]
    assert Encoding("sana", "photos", size=512, tile="256,224").tile_of(32) == (256, 224)
    with pytest.raises(UserError, match="--tile=x: give SIZE,STRIDE"):
        Encoding("sana", "photos", size=512, tile="x").tile_of(32)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 32, "buckets": 512}, "give --size or --buckets, not both"),
        ({"size": 32, "data": "precomputed:x"}, "these are latents already"),
    ],
)
def test_what_cannot_be_encoded(options, words):
    with pytest.raises(UserError, match=words):
        Encoding(**({"checkpoint": "sana", "data": "photos"} | options))
