"""Smoothed rows: the same network in floating point, and nearer to it in int8."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import module_for, place
from sana_jax.checkpoints.loras import open_lora
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.checkpoints.quantised import quantise
from sana_jax.checkpoints.smoothed import SOURCES, factors, products, smooth
from sana_jax.checkpoints.tensors import numpy_dtype
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import mini
from tests.checkpoints.test_peft import random_adapter
from tests.toy import relative_error

CONTRACT = "blocks/ffn/contract"
OUTLIER = 256.0  # of one channel of Mix-FFN's value, whose weights afterwards are as much smaller
ONLY = [(f"dit/{CONTRACT}", "w8a8"), (".*", "none")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint with an outlier in the rows of CONTRACT."""
    mini.save(path := tmp_path_factory.mktemp("base") / "float32", depth=2)
    made = native.open_folder(path)
    flat = {k: np.array(x) for k, x in flatten(made.params["dit"]).items()}
    for name in SOURCES[CONTRACT]:
        flat[name][..., 3] *= OUTLIER
    flat[f"{CONTRACT}/kernel"][:, 3] /= OUTLIER
    made.params["dit"] = traverse_util.unflatten_dict(flat, sep="/")
    return made


@pytest.fixture(scope="module")
def ranges(base):
    channels = flatten(base.params["dit"])[f"{CONTRACT}/kernel"].shape[1]
    largest = np.random.default_rng(0).uniform(0.5, 2, (2, channels)).astype(np.float32)
    largest[:, 3] *= OUTLIER
    largest[1, 5] = 0
    return {CONTRACT: largest}


@pytest.fixture(scope="module")
def exact(base):
    return velocity(base)


def flatten(params):
    return traverse_util.flatten_dict(params, sep="/")


def velocity(checkpoint):
    config = checkpoint.dit
    params = place(
        checkpoint.params["dit"], config, "float32", make_mesh(devices=jax.devices()[:1])
    )
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, config.latent_channels), np.float32)
    caption = rng.standard_normal((2, 5, config.caption_channels), np.float32)
    given = latents, np.full(2, 500.0, np.float32), caption, np.ones((2, 5), bool)
    return np.asarray(jax.jit(module_for(config, "float32").apply)({"params": params}, *given))


def test_factors_are_powers_of_two_between_the_ranges(base, ranges):
    kernel = flatten(base.params["dit"])[f"{CONTRACT}/kernel"]
    found, largest = factors(ranges[CONTRACT], kernel), ranges[CONTRACT]
    assert (np.frexp(found)[0] == 0.5).all() and found.dtype == "float32"
    weights = np.abs(kernel).max(-1)
    exact = np.sqrt(np.where(largest == 0, weights, largest) / weights)
    assert found[1, 5] == 1 and np.abs(np.log2(found / exact)).max() <= 0.5001


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nothing_overflows_where_a_channel_is_all_but_dead(base, ranges, dtype):
    dtype, flat = numpy_dtype(dtype), flatten(base.params["dit"])
    flat = {path: np.asarray(x).astype(dtype) for path, x in flat.items()}
    flat[f"{CONTRACT}/kernel"][:, 7] = ml_dtypes.finfo(dtype).smallest_subnormal
    largest = ranges[CONTRACT].copy()
    largest[:, 7] = 1e4
    small = dataclasses.replace(
        base, params={**base.params, "dit": traverse_util.unflatten_dict(flat, sep="/")}
    )
    after = flatten(smooth(small, {CONTRACT: largest}).params["dit"])
    kernel, before = np.asarray(after[f"{CONTRACT}/kernel"]), flat[f"{CONTRACT}/kernel"]
    assert kernel.dtype == dtype
    kernel, before = (x.astype(np.float64) for x in (kernel, before))
    np.testing.assert_array_equal(kernel, before * factors(largest, before)[..., None])
    assert all(np.isfinite(np.asarray(after[path], np.float32)).all() for path in SOURCES[CONTRACT])


def test_a_network_in_floating_point_computes_the_same_bits(base, ranges, exact):
    made = smooth(base, ranges)
    before, after = flatten(base.params["dit"]), flatten(made.params["dit"])
    changed = {k for k in before if not np.array_equal(before[k], np.asarray(after[k]))}
    assert changed == {f"{CONTRACT}/kernel", *SOURCES[CONTRACT]}
    np.testing.assert_array_equal(velocity(made), exact)


def test_int8_rows_lose_less(base, ranges, exact):
    errors = [
        relative_error(velocity(quantise(made, "w8a8", ONLY)), exact)
        for made in (smooth(base, ranges), base)
    ]
    assert 0 < errors[0] < 0.3 * errors[1]


def test_layers_that_have_no_such_rows_are_refused(base):
    layers = ["blocks/attention/qkv", CONTRACT]
    assert products(base.dit, layers) == [CONTRACT]
    with pytest.raises(UserError, match="--smooth: none of blocks/ffn/contract is w8a8"):
        products(base.dit, layers[:1])
    with pytest.raises(UserError, match="--smooth is for Mix-FFN; the transformer's ffn is mlp"):
        products(dataclasses.replace(base.dit, ffn="mlp"), layers)


def test_a_lora_of_other_rows_is_refused_by_name(base, ranges, tmp_path):
    plain, smoothed = (quantise(x, "w8a8") for x in (base, smooth(base, ranges)))
    smoothed.provenance["quantised"]["smoothing"] = {"prompts": 1}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("contract", "others")}
    for file, targets in zip(files.values(), (CONTRACT, "blocks/attention/.*"), strict=True):
        write_adapter(file, random_adapter(base.dit, (targets,)), base.dit)
        open_lora(str(file), 1.0, plain)
    open_lora(str(files["others"]), 1.0, smoothed)
    with pytest.raises(UserError, match="the rows of blocks/ffn/contract are smoothed"):
        open_lora(str(files["contract"]), 1.0, smoothed)
