"""Networks of a checkpoint: what belongs together, their types, and their place on a mesh."""

import dataclasses

import jax
import numpy as np
import pytest

from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.components import abstract_placed, check_fit, component_dtype, place
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh


@pytest.mark.parametrize(
    "network, change, words",
    [
        ("dit", {"latent_channels": 16}, "16 latent channels, the autoencoder 32"),
        ("dit", {"caption_channels": 32}, "text of width 32, the text encoder writes 48"),
        ("text_encoder", {"vocab_size": 8}, "tokens, the text encoder 8"),
    ],
)
def test_networks_that_do_not_fit_are_refused(network, change, words):
    checkpoint = random_weights.make("tiny")
    check_fit(checkpoint)
    config = dataclasses.replace(getattr(checkpoint, network), **change)
    with pytest.raises(UserError, match=f"{words}.*do not belong together"):
        check_fit(dataclasses.replace(checkpoint, **{network: config}))


def test_only_the_transformer_runs_in_float16():
    assert component_dtype("dit", "float16") == "float16"
    assert component_dtype("vae", "float16") == component_dtype("text_encoder", "float16")
    assert np.dtype(component_dtype("vae", "float16")).name == "bfloat16"
    for dtype in "float32", "bfloat16":
        assert component_dtype("vae", dtype) == component_dtype("dit", dtype) == dtype


def test_parameters_are_placed_as_the_abstract_ones_are():
    checkpoint, mesh = random_weights.make("tiny"), make_mesh(replica=1, fsdp=8)
    params = checkpoint.params["dit"]
    placed = place(params, checkpoint.dit, "bfloat16", mesh)
    abstract = abstract_placed(checkpoint.dit, "bfloat16", mesh)

    def compare(found, expected, lazy):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.sharding == expected.sharding
        np.testing.assert_array_equal(np.asarray(found), np.asarray(lazy, found.dtype))

    jax.tree.map(compare, placed, abstract, params)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
