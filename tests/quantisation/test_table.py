"""The table of quantised layers, on networks of every kind."""

import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.components import CONFIGS, abstract_params
from sana_jax.kernels.int8 import is_quantised
from sana_jax.models.dit import PRESETS
from sana_jax.quantisation.table import METHODS, choose, sums_of, with_quantised
from sana_jax.runtime.errors import UserError

NETWORKS = dict(zip(CONFIGS, random_weights.configs("tiny"), strict=True))
ABSTRACT = {name: abstract_params(config) for name, config in NETWORKS.items()}
TRANSFORMER = {
    "blocks/attention/out",
    "blocks/attention/qkv",
    "blocks/cross_attention/out",
    "blocks/cross_attention/q",
    "blocks/ffn/contract",
    "blocks/ffn/expand",
}


def refused(changes, *words):
    with pytest.raises(UserError) as error:
        choose(ABSTRACT, "w8a8", changes)
    for word in words:
        assert word in str(error.value)


def test_six_products_of_the_transformer_are_quantised_and_the_rest_stays():
    found = choose(ABSTRACT, "w8a8")
    assert dict(found.quantised["dit"]) == dict.fromkeys(TRANSFORMER, "w8a8")
    assert {"dit/blocks/cross_attention/kv", "dit/proj_out", "dit/patch_embed"} <= {*found.kept}
    assert {"vae/encoder/conv_in", "vae/decoder/conv_out"} <= {*found.kept}
    assert ("embed", "w8") in found.quantised["text_encoder"]
    assert {kind for _, kind in found.quantised["vae"]} == {"w8"}
    found = choose(ABSTRACT, "w8")
    assert dict(found.quantised["dit"]) == dict.fromkeys(TRANSFORMER, "w8")


def test_hashes_of_what_networks_encoded_before_do_not_change():
    for config in NETWORKS.values():
        assert "quantised" not in repr(config)


def test_a_user_changes_the_table_first_come_first():
    changes = [
        ("dit/blocks/ffn/.*", "none"),
        ("dit/blocks/.*", "w8"),
        ("text_encoder/layers/down", "w8a8"),
    ]
    found = choose(ABSTRACT, "w8a8", changes)
    dit = dict(found.quantised["dit"])
    assert dit.keys() == (TRANSFORMER | {"blocks/cross_attention/kv"}) - {
        "blocks/ffn/expand",
        "blocks/ffn/contract",
    }
    assert {*dit.values()} == {"w8"}
    assert dict(found.quantised["text_encoder"])["layers/down"] == "w8a8"


def test_bad_changes_are_named():
    refused([("dit/blocks/fnn/.*", "w8")], "dit/blocks/fnn/.*=w8 changes no layer", "ffn/expand")
    refused([("autoencoder/conv_in", "w8")], "autoencoder/conv_in=w8 changes no layer", "vae/")
    refused([(".*", "none")], "w8a8: no layer is left that is quantised")
    refused([("dit/blocks/(", "w8")], "'dit/blocks/('")
    refused([("dit/.*", "w4")], "dit/", "=w4: give one of none, w8, w8a8")
    refused([("vae/.*conv1", "w8a8")], "conv1=w8a8: only a matrix product", "give w8")
    refused([("text_encoder/embed", "w8a8")], "text_encoder/embed=w8a8", "give w8")
    with pytest.raises(UserError, match="no layer blocks/fnn to be w8"):
        with_quantised(ABSTRACT["dit"], (("blocks/fnn", "w8"),))


@pytest.mark.parametrize("network", NETWORKS)
def test_scales_are_of_outputs_and_layers_and_are_split_as_their_values(network):
    params = ABSTRACT[network]
    made = with_quantised(params, choose(ABSTRACT, "w8a8").quantised[network])
    before = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in traverse_util.flatten_dict(made, sep="/").items():
        if not is_quantised(leaf):
            assert leaf == before[path]
            continue
        box, values, scale = before[path], leaf.values, leaf.scale
        assert values.value == jax.ShapeDtypeStruct(box.value.shape, np.int8)
        assert values.names == box.names
        axes = [axis % leaf.values.value.ndim for axis in sums_of(path, leaf)]
        stacked = box.names[0] == "layers"
        for axis, (size, name) in enumerate(zip(box.value.shape, box.names, strict=True)):
            whole = axis in axes
            assert scale.value.shape[axis] == (1 if whole else size)
            assert scale.names[axis] == (None if whole else name)
        if path.endswith("kernel"):
            kept = {0, leaf.values.value.ndim - 1} if stacked else {leaf.values.value.ndim - 1}
            assert {*range(leaf.values.value.ndim)} - {*axes} == kept


def nbytes(tree, dtype_bytes=2):
    leaves = jax.tree.leaves(nn.unbox(tree), is_leaf=is_quantised)
    parts = [x for leaf in leaves for x in (jax.tree.leaves(leaf))]
    quantised = {id(x) for leaf in leaves if is_quantised(leaf) for x in jax.tree.leaves(leaf)}
    return sum(
        math.prod(x.shape) * (x.dtype.itemsize if id(x) in quantised else dtype_bytes)
        for x in parts
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_sana_1600m_take_at_most_0_55_of_their_bytes_in_bfloat16(method):
    networks = dict(zip(CONFIGS, random_weights.configs("sana_1600m_1024"), strict=True))
    assert networks["dit"] == PRESETS["sana_1600m_1024"]
    abstract = {name: abstract_params(config) for name, config in networks.items()}
    layers = choose(abstract, method).quantised
    made = {name: with_quantised(params, layers[name]) for name, params in abstract.items()}
    sizes = {name: (nbytes(made[name]), nbytes(abstract[name])) for name in networks}
    print(sizes)
    now, before = (sum(column) for column in zip(*sizes.values(), strict=True))
    print(now / before)
    assert now <= 0.55 * before
