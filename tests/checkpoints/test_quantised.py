"""Quantised checkpoints: what they hold, how they are stored, and that they draw."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from sana_jax import SanaPipeline
from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import abstract_params
from sana_jax.checkpoints.depth import grow, prune
from sana_jax.checkpoints.load import load
from sana_jax.checkpoints.loras import Lora, merge_into
from sana_jax.checkpoints.quantised import quantise
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.data.precomputed import weights_sha256
from sana_jax.kernels.int8 import is_quantised
from sana_jax.quantisation.table import sums_of
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import mini, toy
from tests.checkpoints.test_peft import random_adapter
from tests.toy import relative_error

METHODS = "w8", "w8a8"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in float32 and quantised by either method."""
    path = tmp_path_factory.mktemp("folders")
    mini.save(path / "float32", depth=2)
    for method in METHODS:
        (path / method).mkdir()
        native.save(quantise(native.open_folder(path / "float32"), method), path / method)
    return path


def leaves(checkpoint, network):
    return traverse_util.flatten_dict(checkpoint.params[network], sep="/")


@pytest.mark.parametrize("network", ["dit", "vae", "text_encoder"])
def test_stored_weights_are_the_nearest_integers_of_each_output(folders, network):
    made, base = (native.open_folder(folders / name) for name in ("w8a8", "float32"))
    boxes = traverse_util.flatten_dict(abstract_params(getattr(made, network)), sep="/")
    count = 0
    for path, leaf in leaves(made, network).items():
        exact = np.asarray(leaves(base, network)[path])
        if not is_quantised(leaf):
            np.testing.assert_array_equal(leaf, exact)
            continue
        count += 1
        values, scale = np.asarray(leaf.values), np.asarray(leaf.scale)
        axes = sums_of(path, boxes[path])
        assert (values.dtype, scale.dtype) == ("int8", "float32")
        np.testing.assert_allclose(scale, np.abs(exact).max(axes, keepdims=True) / 127, rtol=1e-6)
        assert np.abs(values * scale - exact).max(axes, keepdims=True).max() <= 0.5001 * scale.max()
        assert (np.abs(values - exact / scale) <= 0.5001).all()
        assert (np.abs(values.astype(int)).max(axes) == 127).all()
    assert count > 3


def test_model_json_says_what_is_quantised_and_what_stayed(folders):
    model = json.loads((folders / "w8a8" / "model.json").read_text())
    assert ["blocks/attention/qkv", "w8a8"] in model["dit"]["quantised"]
    told = model["provenance"]["quantised"]
    assert told["method"] == "w8a8" and "dit/blocks/cross_attention/kv" in told["kept"]
    before = json.loads((folders / "float32" / "model.json").read_text())
    assert "quantised" not in before["dit"]  # older programs read the folder


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_keeps_int8_and_draws_nearly_the_same(folders, method):
    """Of random weights, which spread errors more than trained ones: see quantisation/README.md."""
    base = SanaPipeline.from_pretrained(folders / "float32", dtype="float32", mesh=one())
    pipe = SanaPipeline.from_pretrained(folders / method, dtype="float32", mesh=one())
    kernel = pipe.params["dit"]["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.values.dtype == "int8" and kernel.scale.dtype == "float32"
    assert kernel.rows == {"w8": "float", "w8a8": "int8"}[method]
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 16, 16, 8), np.float32)
    rows = rng.standard_normal((2, 5, 48), np.float32)
    inputs = latents, 500.0, rows, np.ones((2, 5), bool)
    error = relative_error(pipe.velocity(*inputs), base.velocity(*inputs))
    assert 1e-4 < error < 0.02
    text = [p.encode_prompt(["red circle"], None)[0] for p in (pipe, base)]
    assert 1e-4 < relative_error(*text) < 0.03
    pictures = [p.decode(0.5 * latents) for p in (pipe, base)]
    assert 1e-4 < relative_error(*pictures) < 0.05
    if method == "w8a8":
        images = pipe("red circle", num_steps=2, output="np")
        assert images.shape == (1, 64, 64, 3)


def test_stored_embeddings_are_of_one_kind_of_products(folders):
    """Weights are the same to the bit; what is computed is not."""
    base = native.open_folder(folders / "float32")
    kinds = [quantise(base, "w8", [("text_encoder/layers/.*", k)]) for k in ("w8", "w8a8")]
    first, second = (weights_sha256(m.text_encoder, m.params["text_encoder"]) for m in kinds)
    assert first != second


def one():
    return make_mesh(devices=jax.devices()[:1])


def test_a_mesh_splits_values_and_scales_and_gives_the_same(folders):
    mesh = make_mesh(replica=1, fsdp=2, tensor=2, devices=toy.devices(4))
    pipe = SanaPipeline.from_pretrained(folders / "w8a8", dtype="float32", mesh=mesh)
    kernel = pipe.params["dit"]["blocks"]["attention"]["qkv"]["kernel"]
    assert kernel.values.sharding.spec == P(None, "fsdp", "tensor")
    assert kernel.scale.sharding.spec == P(None, None, "tensor")
    alone = SanaPipeline.from_pretrained(folders / "w8a8", dtype="float32", mesh=one())
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 5, 48), np.float32)
    inputs = rng.standard_normal((2, 16, 16, 8), np.float32), 500.0, rows, np.ones((2, 5), bool)
    # Sums of floats in another order may move a number over a half.
    assert relative_error(pipe.velocity(*inputs), alone.velocity(*inputs)) < 1e-3


def test_dtype_is_of_what_is_not_quantised(folders):
    dit = load(folders / "w8a8", "bfloat16", one()).params["dit"]
    qkv = dit["blocks"]["attention"]["qkv"]["kernel"]
    assert (qkv.values.dtype, qkv.scale.dtype) == ("int8", "float32")
    assert dit["blocks"]["attention"]["out"]["bias"].dtype == "bfloat16"
    assert dit["blocks"]["cross_attention"]["kv"]["kernel"].dtype == "bfloat16"


def test_saving_a_pipeline_writes_the_same_again(folders, tmp_path):
    pipe = SanaPipeline.from_pretrained(folders / "w8a8", dtype="float32", mesh=one())
    pipe.save_pretrained(tmp_path / "again")
    first, second = (native.open_folder(p) for p in (folders / "w8a8", tmp_path / "again"))
    assert first.configs() == second.configs()
    same = jax.tree.map(np.array_equal, first.params, second.params)
    assert all(jax.tree.leaves(same))


def test_what_int8_cannot_be_is_refused_by_name(folders, tmp_path):
    made = native.open_folder(folders / "w8a8")
    with pytest.raises(UserError, match="dit, vae, text_encoder is quantised already"):
        quantise(made, "w8")
    with pytest.raises(UserError, match="diffusers folder cannot hold quantised weights"):
        diffusers.save(made, tmp_path)
    lora = random_adapter(made.dit)
    with pytest.raises(UserError, match="is quantised, and a LoRA cannot be merged into it"):
        merge_into(made, [Lora("x", 1.0, "", lora)])
    with pytest.raises(UserError, match="--grow: the transformer is quantised"):
        grow(made, 4)
    pruned = prune(made, 1, lambda count: [0.0, 1.0])
    kernel = pruned.params["dit"]["blocks"]["ffn"]["expand"]["kernel"]
    whole = made.params["dit"]["blocks"]["ffn"]["expand"]["kernel"]
    np.testing.assert_array_equal(kernel.values, np.asarray(whole.values)[1:])
    np.testing.assert_array_equal(kernel.scale, np.asarray(whole.scale)[1:])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(folders, bad, tmp_path):
    base = native.open_folder(folders / "float32")
    flat = leaves(base, "dit")
    name = "blocks/ffn/expand/kernel"
    broken = np.asarray(flat[name]).copy()
    broken[1, 2, 3] = bad
    flat[name] = LazyArray(broken.shape, broken.dtype, lambda dtype: broken.astype(dtype))
    params = {**base.params, "dit": traverse_util.unflatten_dict(flat, sep="/")}
    made = quantise(dataclasses.replace(base, params=params), "w8")
    with pytest.raises(UserError, match="dit/blocks/ffn/expand/kernel holds NaN or Inf"):
        native.save(made, tmp_path)


def test_folders_that_do_not_fit_are_named(folders, tmp_path):
    for change, word in (
        (["blocks/attention/qkv", "w4"], "blocks/attention/qkv to be w4"),
        (["blocks/atention/qkv", "w8"], "no layer blocks/atention/qkv"),
        ("blocks", "quantised"),
    ):
        model = json.loads((folders / "w8a8" / "model.json").read_text())
        model["dit"]["quantised"][0] = change
        broken = tmp_path / word.split()[0].replace("/", "_")
        broken.mkdir()
        for file in (folders / "w8a8").iterdir():
            if file.name != "model.json":
                (broken / file.name).symlink_to(file)
        (broken / "model.json").write_text(json.dumps(model))
        with pytest.raises(UserError, match=word):
            native.open_folder(broken)
    # Float weights under the name of values.
    made = native.open_folder(folders / "w8a8")
    kernel = made.params["dit"]["blocks"]["ffn"]["expand"]["kernel"]
    floats = LazyArray(
        kernel.shape, np.dtype("float32"), lambda dtype: np.zeros(kernel.shape, dtype)
    )
    made.params["dit"]["blocks"]["ffn"]["expand"]["kernel"] = dataclasses.replace(
        kernel, values=floats
    )
    native.save(made, tmp_path / "floats")
    with pytest.raises(UserError, match="expand/kernel/values is F32.*int8 for values"):
        native.open_folder(tmp_path / "floats")
