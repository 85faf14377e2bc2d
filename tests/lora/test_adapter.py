"""Adapters beside the kernels of a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints.components import abstract_params, init_params, module_for
from sana_jax.kernels.int8 import is_quantised, reference
from sana_jax.lora.adapter import attach, chosen, detach, merge, new_adapter, sites
from sana_jax.lora.config import ATTENTION, LoraConfig
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.models.remat import REMAT
from sana_jax.quantisation.table import choose, sums_of, with_quantised
from sana_jax.runtime.errors import UserError
from tests.toy import assert_close

CONFIG = SanaConfig(
    depth=3, width=64, head_dim=16, latent_channels=4, cross_heads=4, caption_channels=32
)
ABSTRACT = abstract_params(CONFIG)
EVERYWHERE = (".*",)


def quantised(params, method):
    """The network with int8 weights, and the same with the weights that they stand for."""
    layers = choose({"dit": ABSTRACT}, method).quantised["dit"]
    boxes = traverse_util.flatten_dict(with_quantised(ABSTRACT, layers), sep="/")
    made = traverse_util.flatten_dict(params, sep="/")
    for path, box in boxes.items():
        if is_quantised(box):
            scale = reference.scale_of(made[path], sums_of(path, box))
            values = reference.values_of(made[path], scale)
            made[path] = dataclasses.replace(box, values=values, scale=scale)
    floats = {n: x.astype(jnp.float32) for n, x in made.items()}
    return (traverse_util.unflatten_dict(flat, sep="/") for flat in (made, floats))


@pytest.fixture(scope="module")
def params():
    init = functools.partial(init_params, module_for(CONFIG, "float32"))
    return nn.unbox(jax.jit(init)(jax.random.key(0)))


def adapter(targets=ATTENTION, rank=4, seed=1):
    """An adapter that changes the network, unlike a new one."""
    made = nn.unbox(new_adapter(ABSTRACT, LoraConfig(rank, targets=targets), jax.random.key(seed)))
    flat = traverse_util.flatten_dict(made, sep="/")
    rng = np.random.default_rng(seed)
    flat = {
        name: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
        for name, x in flat.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def velocity(params, method=None, rngs=None, remat="none"):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
    caption = rng.standard_normal((2, 5, 32)).astype(np.float32)
    mask, timestep = np.ones((2, 5), bool), np.full(2, 500, np.float32)
    module, variables = module_for(CONFIG, "float32", remat=remat), {"params": params}
    if method is None:
        return module.apply(variables, latents, timestep, caption, mask, rngs=rngs)
    keys_values = module.apply(variables, caption, method="keys_values")
    return module.apply(variables, latents, timestep, keys_values, mask, method="denoise")


def test_a_site_is_a_projection():
    found = sites(ABSTRACT)
    assert found["blocks/attention/q"] == ((3, 64, 64), ("layers", "embed", "heads"))
    assert found["blocks/cross_attention/v"] == ((3, 64, 64), ("layers", "embed", "heads"))
    assert found["blocks/ffn/expand"] == ((3, 64, 320), ("layers", "embed", "mlp"))
    assert found["patch_embed"] == ((4, 64), (None, "embed"))
    assert "blocks/attention/qkv" not in found


@pytest.mark.parametrize("config", [DCAEConfig(), Gemma2Config()])
def test_every_network_has_sites(config):
    assert len(sites(abstract_params(config))) > 6


def test_the_default_targets_are_those_of_both_attentions():
    parts = [f"{kind}/{part}" for kind in ("attention", "cross_attention") for part in "kqv"]
    assert chosen(ABSTRACT, ATTENTION) == [f"blocks/{part}" for part in parts]


def test_a_new_adapter_changes_nothing(params):
    new = nn.unbox(new_adapter(ABSTRACT, LoraConfig(4, targets=EVERYWHERE), jax.random.key(0)))
    assert (velocity(attach(params, [(new, 1.0)])) == velocity(params)).all()


@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE])
@pytest.mark.parametrize("method", [None, "denoise"])
def test_attached_equals_merged(params, targets, method):
    attached = attach(params, [(adapter(targets), 0.7)])
    assert_close(velocity(merge(attached), method), velocity(attached, method), 1e-5)
    with pytest.raises(AssertionError):
        assert_close(velocity(params, method), velocity(attached, method), 1e-2)


@pytest.mark.parametrize("remat", REMAT)
def test_rematerialised_blocks_compute_the_same_gradient(params, remat):
    if remat == "offload":
        pytest.skip("not on a CPU")

    def loss(update, remat):
        return (velocity(attach(params, [(update, 1.0)]), remat=remat) ** 2).mean()

    update = adapter()
    plain, other = (jax.jit(jax.grad(loss), static_argnums=1)(update, r) for r in ("none", remat))
    for name, gradient in traverse_util.flatten_dict(plain, sep="/").items():
        assert np.abs(gradient).max() > 0, name
        assert_close(traverse_util.flatten_dict(other, sep="/")[name], gradient, 1e-4, name)


def test_blocks_computed_again_drop_the_same_inputs(params):
    """The gradient is the slope of the loss: with other dropout the second time it would not be."""
    update = adapter()

    @jax.jit
    def loss(update):
        attached = attach(params, [(update, 1.0)], dropout=0.5)
        return (velocity(attached, rngs={"dropout": jax.random.key(0)}, remat="full") ** 2).mean()

    gradient = jax.grad(loss)(update)
    length = sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient)) ** 0.5
    above, below = (
        loss(jax.tree.map(lambda x, g, step=step: x + step / length * g, update, gradient))
        for step in (1e-2, -1e-2)
    )
    assert_close((above - below) / 2e-2, length, 1e-2)


def test_an_update_of_q_leaves_k_and_v(params):
    update = adapter((r"blocks/attention/q",))
    before, after = (
        p["blocks"]["attention"]["qkv"]["kernel"]
        for p in (params, merge(attach(params, [(update, 1.0)])))
    )
    q = update["blocks"]["attention"]["q"]
    np.testing.assert_allclose(after[..., :64] - before[..., :64], q["a"] @ q["b"], atol=1e-5)
    assert (after[..., 64:] == before[..., 64:]).all()


def test_adapters_add_up_with_their_weights(params):
    one, two = adapter(seed=1), adapter(EVERYWHERE, rank=2, seed=2)
    both = attach(params, [(one, 0.5), (two, -2.0)])
    in_turn = merge(attach(merge(attach(params, [(one, 0.5)])), [(two, -2.0)]))
    assert_close(velocity(both), velocity(in_turn), 1e-5)


def test_each_layer_may_have_a_scale_of_its_own(params):
    update = adapter((r"blocks/attention/q",))
    site = update["blocks"]["attention"]["q"]
    scaled = {"blocks": {"attention": {"q": site | {"scale": np.array([1.0, 0.0, 2.0])}}}}
    factor = np.array([1.0, 0.0, 2.0], np.float32)[:, None, None]
    by_hand = {"blocks": {"attention": {"q": site | {"b": site["b"] * factor}}}}
    ours, theirs = (velocity(attach(params, [(each, 1.0)])) for each in (scaled, by_hand))
    assert (ours == theirs).all()


def test_dropout_needs_a_key(params):
    attached = attach(params, [(adapter(), 1.0)], dropout=0.5)
    assert (velocity(attached) == velocity(attach(params, [(adapter(), 1.0)]))).all()
    first, again, other = (
        velocity(attached, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert not np.allclose(first, other)


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(width=32, cross_heads=2), "another network"),
        (dict(depth=2), "another network"),
        (dict(caption_channels=16), "another network"),
    ],
)
def test_an_adapter_of_another_network_is_refused(change, told):
    import dataclasses

    other = abstract_params(dataclasses.replace(CONFIG, **change))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), nn.unbox(other))
    with pytest.raises(UserError, match=told):
        attach(params, [(adapter(EVERYWHERE), 1.0)])


def test_an_unknown_site_is_refused(params):
    site = {"a": np.zeros((3, 64, 4)), "b": np.zeros((3, 4, 64))}
    for name in "nowhere", "attention":
        with pytest.raises(UserError, match="no such matrix"):
            attach(params, [({"blocks": {name: {"z": site}}}, 1.0)])


def test_what_is_detached_is_as_it_was(params):
    plain = detach(attach(params, [(adapter(EVERYWHERE), 1.0)]))
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, plain, params)


def test_an_adapter_stands_beside_int8_weights_as_beside_those_they_stand_for(params):
    made, floats = quantised(params, "w8")
    pairs = [(adapter(EVERYWHERE), 0.5)]
    assert_close(velocity(attach(made, pairs)), velocity(attach(floats, pairs)), 1e-5)
    back = detach(attach(made, pairs))
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, back, made))


@pytest.mark.parametrize("method", [pytest.param("w8", marks=pytest.mark.slow), "w8a8"])
def test_gradients_of_an_adapter_go_through_int8_weights(params, method):
    """Those of int8 rows are straight-through: near the ones of the same weights in float."""
    made, floats = quantised(params, method)
    start = adapter(EVERYWHERE)

    def gradient(base, remat="none"):
        def loss(update):
            return jnp.mean(velocity(attach(base, [(update, 1.0)]), "__call__", remat=remat) ** 2)

        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(start))])

    bar = {"w8": 1e-4, "w8a8": 0.1}[method]
    found = gradient(made)
    assert jnp.isfinite(found).all()
    assert_close(found, gradient(floats), bar)
    assert_close(gradient(made, "full"), found, 1e-4)
