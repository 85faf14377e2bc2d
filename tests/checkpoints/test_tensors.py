"""Safetensors files: one or several shards, and damage is named."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sana_jax.checkpoints.tensors import TensorReader, Unprefixed, on_host, write_tensors
from sana_jax.runtime.errors import UserError
from tests.checkpoints.folders import WEIGHTS, load_on_one_device


def test_shards_hold_what_one_file_holds(tmp_path):
    arrays = {
        "a.odd": np.arange(3).astype(ml_dtypes.bfloat16),
        "a.wide": np.arange(4, dtype=np.float64),
        "count": np.array(7, np.int64),
    }
    (single,) = write_tensors(arrays.items(), tmp_path, "single")
    assert {*load_file(single)} == {*arrays}  # the format's own reader takes the file
    *shards, index = write_tensors(arrays.items(), tmp_path, "several", max_shard_bytes=40)
    assert [path.name for path in shards] == [
        "several-00001-of-00002.safetensors",
        "several-00002-of-00002.safetensors",
    ]
    for path in single, index:
        reader = TensorReader(path, prefix="a.")
        assert {*reader} == {"odd", "wide", "count"}
        assert [reader.dtype(name) for name in ("odd", "wide", "count")] == ["BF16", "F64", "I64"]
        for name, array in arrays.items():
            found = reader[name.removeprefix("a.")]
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)


def test_no_copy_stays_with_a_jax_array():
    array = jnp.arange(3.0)
    np.testing.assert_array_equal(on_host(array), [0, 1, 2])
    assert array._npy_value is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "change, words",
    [
        (truncate, "not a whole safetensors file"),
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: p.write_text("<html><body>404</body></html>"), "a web page"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-LFS pointer"),
        (lambda p: p.unlink(), "has no diffusion_pytorch_model.safetensors"),
        (lambda p: p.rename(p.with_suffix(".bin")), "pickled .bin"),
    ],
)
def test_damaged_files_are_named(folder, change, words):
    change(folder / WEIGHTS)
    with pytest.raises(UserError, match="transformer.*" + words):
        load_on_one_device(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda i: i.unlink(), "has no diffusion_pytorch_model"),
        (lambda i: i.write_text("{}"), "not an index"),
        (lambda i: i.write_text("not json"), "not an index"),
        (lambda i: i.write_text("[" * 100_000), "not an index"),
        (lambda i: i.write_text('{"weight_map": ["a"]}'), "not an index"),
        (lambda i: i.write_text('{"weight_map": {"a": ["b"]}}'), "no file's name"),
        (lambda i: i.write_text(json.dumps({"weight_map": {"a": "b" * 300}})), "too long"),
        (lambda i: next(i.parent.glob("*-of-*")).unlink(), "is missing"),
        (lambda i: i.write_text(i.read_text().replace('": "', '": "../')), "outside its folder"),
        (lambda i: i.write_text(i.read_text().replace('": "', '": "/')), "outside its folder"),
        (
            lambda i: i.write_text(i.read_text().replace('"scale_shift_table"', '"no_such"')),
            "lacks no_such",
        ),
    ],
)
def test_damaged_indices_are_named(theirs, folder, change, words):
    (folder / WEIGHTS).unlink()
    theirs.transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    change(folder / f"{WEIGHTS}.index.json")
    with pytest.raises(UserError, match=words):
        load_on_one_device(folder)


def test_a_prefix_that_all_names_share_is_dropped(tmp_path):
    def names(*given):
        save_file({name: np.zeros(1, np.float32) for name in given}, tmp_path / "a")
        found = Unprefixed(TensorReader(tmp_path / "a"))
        assert len(found) == len(given) and all(
            found.shape(name) == found[name].shape == (1,) and found.dtype(name) == "F32"
            for name in found
        )
        assert all(name in found for name in found) and "model" not in found
        return set(found)

    assert names("model.diffusion_model.a", "model.diffusion_model.b") == {"a", "b"}
    assert names("module.a", "module.model.b") == {"a", "model.b"}
    assert names("model.a", "b") == {"model.a", "b"}
    assert names() == set()


def test_a_tensor_with_and_without_the_prefix_is_named(tmp_path):
    save_file({name: np.zeros(1, np.float32) for name in ("model.a", "a")}, tmp_path / "twice")
    with pytest.raises(UserError, match="twice holds a twice: as model.a too"):
        TensorReader(tmp_path / "twice", prefix="model.")
