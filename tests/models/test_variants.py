"""The parts that SANA replaced: beside torch's, and in the transformer as SANA's own are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from sana_jax import sharding
from sana_jax.models.dit import VARIANTS, SanaConfig, SanaTransformer
from sana_jax.models.layers import GLUMBConv
from sana_jax.models.remat import REMAT
from sana_jax.models.variants import MLP, mlp_width, softmax_attention
from tests import toy

CONFIG = SanaConfig(
    depth=2, width=64, head_dim=16, cross_heads=2, caption_channels=48, latent_channels=8
)
FIELDS = [{"attention": "softmax"}, {"ffn": "mlp"}, {"objective": "ddpm"}]
RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((4, 4, 6, 8)).astype(np.float32)
CAPTION = RNG.standard_normal((4, 5, 48)).astype(np.float32)
INPUTS = LATENTS, np.full(4, 437.0, np.float32), CAPTION, np.arange(5) < RNG.integers(1, 6, (4, 1))


@functools.cache
def made(**fields):
    """A network of these fields, and weights that are nowhere zero."""
    model = SanaTransformer(dataclasses.replace(CONFIG, **fields))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *INPUTS))["params"]
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return model, jax.tree.map(lambda x, k: x + 0.02 * jax.random.normal(k, x.shape), params, keys)


def test_softmax_attention_is_that_of_torch():
    qkv = RNG.standard_normal((2, 7, 96)).astype(np.float32)
    q, k, v = (torch.tensor(t).view(2, 7, 2, 16).transpose(1, 2) for t in np.split(qkv, 3, -1))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    theirs = theirs.transpose(1, 2).reshape(2, 7, 32).numpy()
    toy.assert_close(softmax_attention(jnp.asarray(qkv), 16), theirs, 1e-5)


def test_mlp_is_that_of_torch():
    x, scale = RNG.standard_normal((2, 3, 4, 8)), RNG.standard_normal((2, 1, 1, 8))
    x, scale = x.astype(np.float32), scale.astype(np.float32)
    module = MLP(20)
    params = nn.unbox(module.init(jax.random.key(0), x, scale))["params"]
    expand, contract = (
        [torch.tensor(np.array(params[name][part])) for part in ("kernel", "bias")]
        for name in ("expand", "contract")
    )
    hidden = torch.nn.functional.gelu(torch.tensor(x) @ expand[0] + expand[1], approximate="tanh")
    theirs = (hidden @ contract[0] + contract[1]).numpy() * scale
    toy.assert_close(module.apply({"params": params}, x, scale), theirs, 1e-5)


def test_mlp_has_the_weights_of_mix_ffn():
    """But for the depthwise kernel and the biases."""
    x, scale = jnp.zeros((1, 2, 2, 32)), jnp.ones((1, 1, 1, 32))

    def weights(module):
        params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, scale))["params"]
        return sum(params[name]["kernel"].size for name in ("expand", "contract"))

    assert weights(MLP(80)) == weights(GLUMBConv(80)) and mlp_width(80) == 120


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_variant_samples_as_it_trains(fields):
    """Keys and values once a prompt give the same velocity, which is not that of SANA's own."""
    model, params = made(**fields)
    latents, timestep, caption, mask = INPUTS
    whole = model.apply({"params": params}, *INPUTS)
    keys_values = model.apply({"params": params}, caption, method="keys_values")
    inputs = latents, timestep, keys_values, mask
    parts = model.apply({"params": params}, *inputs, method="denoise")
    toy.assert_close(parts, whole, 1e-6)
    if fields.get("ffn") != "mlp":
        own = SanaTransformer(CONFIG).apply({"params": params}, *INPUTS)
        assert np.linalg.norm(own - whole) > 0.01 * np.linalg.norm(whole)


@pytest.mark.parametrize("fields", FIELDS[:2], ids=str)
@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"none", "offload"}))
def test_remat_changes_no_gradient(fields, remat):
    model, params = made(**fields)

    def gradient(model):
        def loss(params):
            return jnp.square(model.apply({"params": params}, *INPUTS)).mean()

        return jax.jit(jax.grad(loss))(params)

    then, now = (jax.tree.leaves(gradient(m)) for m in (model, model.clone(remat=remat)))
    for ours, theirs in zip(now, then, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_mesh_changes_no_velocity(fields):
    """Neither where it splits weights, batch and heads, nor where it splits tokens."""
    model, params = made(**fields)
    alone = jax.jit(model.apply)({"params": params}, *INPUTS)
    for axes in dict(replica=1, fsdp=2, tensor=2), dict(replica=1, sequence=2, tensor=2):
        mesh = sharding.make_mesh(**axes, devices=toy.devices(4))
        boxed = jax.eval_shape(model.init, jax.random.key(0), *INPUTS)["params"]
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharding.shardings_for(boxed, mesh))
            inputs = jax.device_put(INPUTS, sharding.batch_sharding(mesh))
            found = jax.jit(lambda p, *x: model.apply({"params": p}, *x))(placed, *inputs)
        toy.assert_close(found, alone, 1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_unknown_variant_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"transformer {name} 'other' is not one of"):
        dataclasses.replace(CONFIG, **{name: "other"})
    with pytest.raises(ValueError, match=f"transformer {name} 3 is not a text"):
        dataclasses.replace(CONFIG, **{name: 3})
