"""LoRAs as users name them, and their merge."""

from functools import partial

import jax
import numpy as np
import pytest

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.diffusers_configs import gemma2_from_transformers
from sana_jax.checkpoints.find import file_sha256
from sana_jax.checkpoints.loras import merge_into, open_all, open_lora, split
from sana_jax.checkpoints.peft import read_adapter, write_adapter
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.lora.adapter import attach, by_network, merge, with_text_encoder
from sana_jax.runtime.errors import UserError
from tests import toy
from tests.checkpoints.test_peft import random_adapter, velocity


@pytest.fixture(scope="module")
def theirs():
    module, config = toy.transformer()
    return toy.params(module, config), config


@pytest.fixture
def file(theirs, tmp_path):
    file = tmp_path / "lora.safetensors"
    write_adapter(file, random_adapter(theirs[1]), theirs[1], alpha=3)
    return file


def lazy(array):
    return LazyArray(array.shape, array.dtype, lambda dtype: array.astype(dtype))


def test_a_weight_is_what_stands_after_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert split("a/b.safetensors:0.8") == ("a/b.safetensors", 0.8)
    assert split("org/name:-2e-1") == ("org/name", -0.2)
    assert split("a:3/b") == ("a:3/b", 1.0)
    (tmp_path / "odd:7").touch()
    assert split("odd:7") == ("odd:7", 1.0)
    assert split("odd:7:2") == ("odd:7", 2.0)


@pytest.mark.parametrize("weight", ["", "much", "nan", "inf", "1e9"])
def test_a_weight_that_is_no_number_is_refused(weight, file, theirs):
    with pytest.raises(UserError, match="weight"):
        open_all([f"{file}:{weight}"], Checkpoint(None, theirs[1]))


def test_a_file_is_named_once(file, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="given twice"):
        open_all([str(file), f"{file.name}:0.5"], Checkpoint(None, theirs[1]))


def test_an_autoencoder_alone_takes_none(file):
    assert open_all([], Checkpoint(None)) == []
    with pytest.raises(UserError, match="no transformer"):
        open_all([str(file)], Checkpoint(None))


def test_merged_equals_attached(file, theirs, tmp_path):
    params, config = theirs
    other = tmp_path / "other.safetensors"
    write_adapter(other, random_adapter(config, ("blocks/attention/.*",), 2, seed=7), config)
    loras = open_all([f"{file}:0.5", f"{other}:-0.4"], Checkpoint(None, config))
    base = Checkpoint(None, config, params={"dit": jax.tree.map(lazy, params)}, provenance={"a": 1})
    made = merge_into(base, loras)
    attached = attach(
        params, [(read_adapter(file, config), 0.5), (read_adapter(other, config), -0.4)]
    )
    merged = jax.tree.map(np.asarray, made.params["dit"])
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    toy.assert_close(velocity(config, merged), velocity(config, attached), 1e-5)
    with pytest.raises(AssertionError):
        toy.assert_close(velocity(config, merged), velocity(config, params), 1e-2)
    told = [
        {"name": name.name, "weight": weight, "sha256": file_sha256(name)}
        for name, weight in ((file, 0.5), (other, -0.4))
    ]
    assert made.provenance == {"a": 1, "loras": told}
    assert base.provenance == {"a": 1} and merge_into(base, []) is base


def test_both_networks_are_merged(theirs, tmp_path):
    params, config = theirs
    module = toy.text_encoder(64)
    reader = gemma2_from_transformers(module.config.to_dict())
    read = toy.params(module, reader)
    adapter = with_text_encoder(random_adapter(config), random_adapter(reader))
    write_adapter(tmp_path / "both.safetensors", adapter, config, text_encoder=reader)
    unread = {"dit": jax.tree.map(lazy, params), "text_encoder": jax.tree.map(lazy, read)}
    base = Checkpoint(None, config, reader, params=unread)
    made = merge_into(base, open_all([f"{tmp_path}/both.safetensors:0.5"], base)).params
    for network, plain in {"dit": params, "text_encoder": read}.items():
        wanted = merge(attach(plain, [(by_network(adapter)[network], 0.5)]))
        close = partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, jax.tree.map(np.asarray, made[network]), wanted)


def test_a_sum_is_rounded_once_to_the_wanted_type(file, theirs):
    params, config = theirs
    base = Checkpoint(None, config, params={"dit": jax.tree.map(lazy, params)})
    lora = open_lora(str(file), 1.0, base)
    kernel = merge_into(base, [lora]).params["dit"]["proj_out"]["kernel"]
    narrow = np.asarray(kernel, np.float16)
    assert narrow.dtype == np.float16 and np.array_equal(
        narrow, np.asarray(kernel).astype("float16")
    )
    huge = jax.tree.map(lambda x: lazy(np.full_like(x, 3.4e38)), params)
    base = Checkpoint(None, config, params={"dit": huge})
    with pytest.raises(UserError, match="proj_out/kernel overflows float16"):
        np.asarray(merge_into(base, [lora]).params["dit"]["proj_out"]["kernel"], np.float16)
