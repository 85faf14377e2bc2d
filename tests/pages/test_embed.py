"""Pictures become data URIs of the size that there is room for."""

import base64
import io

import numpy as np
import pytest
from etils import epath
from PIL import Image

from sana_jax.pages.embed import data_uri, embed


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def read(uri: str) -> Image.Image:
    start, _, content = uri.partition(",")
    assert start == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


NOISE = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)


def test_a_small_picture_is_exact_and_a_large_one_is_shrunk_until_it_fits():
    small = np.repeat(np.repeat(NOISE[:8, :8], 16, 0), 16, 1)
    np.testing.assert_array_equal(
        np.asarray(read(data_uri(png(small), 20_000)).convert("RGB")), small
    )
    sizes = []
    for most in 10**6, 40_000, 9_000:
        uri = data_uri(png(NOISE), most)
        assert len(uri) <= most
        sizes.append(read(uri).size)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == (600, 300) and sizes[2][0] < 300


@pytest.mark.parametrize(
    "content", [b"", b"<html>", png(NOISE)[:5000], png(NOISE[..., 0].astype(np.uint16))], ids=len
)
def test_what_is_no_picture_of_ours_is_said(content):
    with pytest.raises(ValueError):
        data_uri(content, 10**6)


def test_files_share_the_room_and_a_bad_one_costs_nobody_else(tmp_path):
    paths = [epath.Path(tmp_path / f"{i}.png") for i in range(4)]
    for path in paths[:2]:
        path.write_bytes(png(NOISE))
    paths[2].write_bytes(b"no")
    *good, bad, missing = embed(paths, 60_000)
    assert all(0 < len(uri) <= 15_000 for uri in good)
    assert str(bad) == "it is no PNG" and "No such file" in str(missing)
