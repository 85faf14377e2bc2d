"""Sheets, 8 bits and floats, PNG files."""

import io
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax.pictures import check_out, encode_png, in_rows, make_grid, save_png, to_float
from sana_jax.runtime.errors import UserError


def picture(value, height=4, width=6):
    return np.full((height, width, 3), value, np.uint8)


def test_grid():
    sheet = make_grid([[picture(1), picture(2, 2, 3)], [picture(3)]], gap=1)
    assert sheet.shape == (9, 13, 3)
    assert (sheet[:4, :6] == 1).all() and (sheet[5:, :6] == 3).all()
    assert (sheet[:2, 7:10] == 2).all() and sheet[4].min() == 255 and sheet[5:, 7:].min() == 255


def test_the_last_row_may_have_fewer_pictures():
    pictures = [picture(value) for value in range(5)]
    rows = in_rows(pictures, 2)
    assert [len(row) for row in rows] == [2, 2, 1]
    sheet = make_grid(rows, gap=0)
    assert sheet.shape == (12, 12, 3)
    assert (sheet[8:, :6] == 4).all() and (sheet[8:, 6:] == 255).all()


def test_floats_are_those_of_the_formula_in_numpy_and_jax():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    found, on_device = to_float(every), to_float(jnp.asarray(every))
    assert found.dtype == on_device.dtype == np.float32
    assert isinstance(found, np.ndarray) and isinstance(on_device, jax.Array)
    for values in found, on_device:
        np.testing.assert_allclose(values, every / 127.5 - 1, rtol=0, atol=2**-22)
    assert (found[0, 0, 0], found[-1, -1, 0]) == (-1, 1)


def test_a_png_file_holds_the_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(check_out(str(tmp_path / "a.png")), pixels)
    assert (tmp_path / "a.png").read_bytes() == encode_png(pixels)
    assert (np.asarray(Image.open(io.BytesIO(encode_png(pixels)))) == pixels).all()


@pytest.mark.parametrize(
    "name, words",
    [
        ("a.jpg", "a name that ends with .png"),
        ("folder.png", "is a folder"),
        ("new/a.png", "is not there; make it first"),
        ("pipe.png", "is a pipe, where a file is needed"),
    ],
)
def test_a_bad_out_is_told_before_any_work(tmp_path, name, words):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=f"^--out={re.escape(str(tmp_path))}.*{words}"):
        check_out(str(tmp_path / name))
