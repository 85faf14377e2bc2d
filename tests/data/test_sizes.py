"""Sizes from headers: those that decoding gives, kept in a file; reasons where there are none."""

import collections

import numpy as np
import pytest
from PIL import Image, ImageFile

from sana_jax.data.images import BadImage, decode, size_of
from sana_jax.data.sizes import image_sizes
from sana_jax.data.sources import open_source
from tests.data import bad_files
from tests.data.bad_files import TURNED_RIGHT, encode, picture
from tests.data.test_folder import make

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = TURNED_RIGHT
    return encode(picture(), kind, exif=exif)


@pytest.fixture(scope="module")
def odd():
    return bad_files.usable() | {f"t.{k}": turned(k) for k in ("JPEG", "PNG", "WEBP", "TIFF")}


def test_a_header_gives_the_size_that_decoding_gives(odd):
    for name, data in odd.items():
        assert size_of(data) == decode(data).shape[:2], name
    assert size_of(odd["t.PNG"]) == picture().shape[1::-1]


def test_orientation_behind_the_pixels_counts_too():
    """A PNG may tell it after its pixels."""
    data = turned("PNG")
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert late.index(b"eXIf") > late.index(b"IDAT")
    assert size_of(late) == decode(late).shape[:2] == picture().shape[1::-1]


def test_no_pixel_is_decoded(monkeypatch):
    data, bad = encode(picture(), "PNG"), bad_files.unusable()
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert size_of(data) == (bad_files.HEIGHT, bad_files.WIDTH)
    for name in ("bomb_400mp.png", "bomb_69mp.png"):
        with pytest.raises(BadImage, match="too_many_pixels"):
            size_of(bad[name][0])


def test_item_28_sizes_of_a_folder_with_bad_files(tmp_path, odd, monkeypatch):
    bad = bad_files.unusable()
    files = odd | {name: data for name, (data, _) in bad.items()}
    source = open_source(str(make(tmp_path / "data", files)))
    sizes, counts = image_sizes(source, tmp_path / "cache")
    assert sizes.shape == (len(source), 2) and sizes.dtype == np.int32
    assert counts.read == len(source) == counts.used + sum(counts.rejected.values())
    for i in range(len(source)):
        record = source[i]
        expected = (0, 0) if record["key"] in bad else decode(files[record["key"]]).shape[:2]
        if record["key"] in bad and tuple(sizes[i]) != (0, 0):  # its header is good
            assert bad[record["key"]][1] in ("truncated", "damaged", "unsupported_mode")
        else:
            assert tuple(sizes[i]) == expected, record["key"]
    found = +collections.Counter(counts.rejected)
    assert found <= collections.Counter(reason for _, reason in bad.values())

    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("sana_jax.data.sizes._read", None)  # and not read again
    again, same = image_sizes(source, tmp_path / "cache")
    np.testing.assert_array_equal(again, sizes)
    assert same == counts


def test_a_damaged_file_is_read_anew_and_other_data_has_another(tmp_path):
    first = open_source(str(make(tmp_path / "a", {"a.png": encode(picture(), "PNG")})))
    sizes, _ = image_sizes(first, tmp_path)
    (kept,) = tmp_path.glob("sizes-*.npz")
    content = kept.read_bytes()
    entry = content.index(b"PK\1\2") + 6  # of the directory: the version that reading needs
    later = content[:entry] + b"\x50" + content[entry + 1 :]
    for damage in (content[:50], b"", content[:80] + b"\x00" + content[81:], later):
        kept.write_bytes(damage)
        np.testing.assert_array_equal(image_sizes(first, tmp_path)[0], sizes)
    assert kept.read_bytes() == content
    second = open_source(str(make(tmp_path / "b", {"a.png": encode(picture()[:20], "PNG")})))
    assert image_sizes(second, tmp_path)[0].tolist() == [[20, 48]]
    assert len(list(tmp_path.glob("sizes-*"))) == 2
