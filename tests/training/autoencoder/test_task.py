"""The autoencoder's train step against gradients of the losses as the module states them."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util

from sana_jax import sharding
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.pictures import to_float
from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder import losses
from sana_jax.training.autoencoder.discriminator import Discriminator
from sana_jax.training.autoencoder.perceptual import laplacian, make_perceptual
from sana_jax.training.autoencoder.task import AutoencoderTask, Phase
from sana_jax.training.optimizers.optimizers import OptimizerConfig
from sana_jax.training.state import on_mesh

NETWORK = DCAEConfig(
    latent_channels=4,
    attention_head_dim=8,
    encoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"),
    decoder_blocks=("ResBlock", "ResBlock", "EfficientViTBlock"),
    encoder_channels=(8, 8, 16),
    decoder_channels=(8, 8, 16),
    encoder_layers=(0, 1, 1),
    decoder_layers=(0, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), ()),
    decoder_norms=("rms_norm",) * 3,
    decoder_activations=("silu",) * 3,
)
SGD_LIKE = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
PHASE = Phase(
    steps=10, image_size=32, batch_size=4, trainable=(".*",), autoencoder=SGD_LIKE, ema_decay=0.5
)
HEAD = dataclasses.replace(PHASE, trainable=("decoder/conv_out/.*",), adversarial=0.5)


@functools.cache  # a task's step is compiled once
def task(phase=PHASE, **fields) -> AutoencoderTask:
    distance, _ = make_perceptual("laplacian")
    model = DCAE(NETWORK, **fields)
    return AutoencoderTask(model, Discriminator(width=8, layers=2), phase, distance)


def images(seed=0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (4, 32, 32, 3), 0, 256).astype(jnp.uint8)


@pytest.fixture(scope="module")
def start():
    """Returns states of a phase without a discriminator, and of one with it."""
    return {
        phase: nn.unbox(jax.jit(task(phase).init)(jax.random.key(1))) for phase in (PHASE, HEAD)
    }


@functools.cache
def jitted(task):
    return jax.jit(task.step)


def step(task, state, images):
    return jitted(task)(state, {"image": images}, {})


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(tree), sep="/")


def changed(before, after):
    before, after = flat(before), flat(after)
    return {k for k in before if before[k].tobytes() != after[k].tobytes()}


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_first_update_is_that_of_adam_on_the_loss(start, microbatches):
    phase = dataclasses.replace(PHASE, microbatches=microbatches, l2=2.0)
    state, x = start[PHASE], to_float(images())
    after, metrics = step(task(phase), state, images())

    def loss(params):
        y = DCAE(NETWORK).apply({"params": params}, x)
        pixels = jnp.abs(y - x).mean() + 2 * ((y - x) ** 2).mean()
        return pixels + 0.25 * laplacian(y, x).mean(), y

    params = state.params["autoencoder"]
    (value, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.global_norm(gradient), rtol=1e-4)
    psnr = 10 * np.log10(4 / np.mean((np.asarray(y) - np.asarray(x)) ** 2))
    np.testing.assert_allclose(metrics["psnr"], psnr, rtol=1e-5)
    # Adam's first update is the gradient's sign, but where the gradient is next to nothing.
    new, old, gradient = map(flat, (after.params["autoencoder"], params, gradient))
    for name, g in gradient.items():
        decay = 0.1 * old[name] if name.endswith("kernel") else 0
        expected = -1e-3 * (g / (np.abs(g) + 1e-8) + decay)
        sure = np.abs(g) > 1e-5
        np.testing.assert_allclose(
            (new[name] - old[name])[sure], expected[sure], rtol=1e-2, atol=1e-7, err_msg=name
        )


def test_the_average_follows_the_parameters(start):
    state = start[PHASE]
    after, _ = step(task(), state, images())
    # Of update 0 the decay is min(0.5, 1 / 10).
    expected = jax.tree.map(lambda a, p: a + 0.9 * (p - a), state.ema, after.params["autoencoder"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.ema, expected)


@pytest.mark.parametrize(
    "patterns",
    [
        ("encoder/conv_out/.*", "decoder/conv_in/.*"),
        # Of the same layer as in the adversarial step.
        pytest.param(("decoder/conv_out/.*",), marks=pytest.mark.slow),
    ],
)
def test_what_is_frozen_does_not_change_by_a_bit(start, patterns):
    phase = dataclasses.replace(PHASE, trainable=patterns)
    the_task, state = task(phase), start[PHASE]
    state = state.replace(opt_state={"autoencoder": the_task.tx.init(state.params["autoencoder"])})
    after = state
    for seed in range(3):
        after, _ = step(the_task, after, images(seed))
    layers = {pattern.removesuffix("/.*") for pattern in patterns}
    expected = {f"{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
    expected &= flat(state.ema).keys()
    assert changed(state.params["autoencoder"], after.params["autoencoder"]) == expected
    assert changed(state.ema, after.ema) == expected


def test_adversarial_step(start):
    """Both networks' updates, and the weight that balances the losses at the last layer."""
    state, x = start[HEAD], to_float(images())
    after, metrics = step(task(HEAD), state, images())
    params, judge = state.params["autoencoder"], state.params["discriminator"]

    def reconstruct(head):
        changed = {**params, "decoder": {**params["decoder"], "conv_out": head}}
        return DCAE(NETWORK).apply({"params": changed}, x)

    def logits(params, images):
        return Discriminator(width=8, layers=2).apply({"params": params}, images)

    def reconstruction(head):
        y = reconstruct(head)
        return jnp.abs(y - x).mean() + 0.25 * laplacian(y, x).mean()

    def generator(head):
        return -logits(judge, reconstruct(head)).mean()

    def discriminator(judge):
        real, fake = logits(judge, x), logits(judge, reconstruct(head))
        return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

    head = params["decoder"]["conv_out"]
    rec, gen = (jax.jit(jax.grad(loss))(head) for loss in (reconstruction, generator))
    weight = losses.adaptive_weight(rec, gen)
    np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=1e-3)
    total = optax.global_norm(jax.tree.map(lambda r, g: r + 0.5 * weight * g, rec, gen))
    np.testing.assert_allclose(metrics["gradient_norm"], total, rtol=1e-3)
    value, gradient = jax.jit(jax.value_and_grad(discriminator))(judge)
    np.testing.assert_allclose(metrics["discriminator"], value, rtol=1e-5)
    assert changed(params, after.params["autoencoder"]) == {
        f"decoder/conv_out/{leaf}" for leaf in head
    }
    moved, gradient = (
        flat(jax.tree.map(jnp.subtract, after.params["discriminator"], judge)),
        flat(gradient),
    )
    for name, g in gradient.items():
        sure = np.abs(g) > 1e-4
        assert (np.sign(moved[name]) == -np.sign(g))[sure].all(), name


def test_microbatches_equal_the_whole_batch_with_a_discriminator_too(start):
    whole, of_whole = step(task(HEAD), start[HEAD], images())
    halves = dataclasses.replace(HEAD, microbatches=2)
    parts, of_parts = step(task(halves), start[HEAD], images())
    for name, value in of_whole.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=2e-4, err_msg=name)
    # Adam divides by the gradient's size, so tiny gradients may differ: look at the moments.
    first = jax.tree.map(np.asarray, (whole.opt_state, parts.opt_state))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *first)


def test_nan_changes_nothing_but_the_counts(start):
    good = start[HEAD]
    kernel = good.params["autoencoder"]["encoder"]["conv_in"]["kernel"]
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan) if x is kernel else x, good.params)
    state = good.replace(params=bad)
    after, _ = step(task(HEAD), state, images())
    for name in ("params", "opt_state", "ema"):
        same = jax.tree.map(
            lambda a, b: a.tobytes() == b.tobytes(),
            *map(partial(jax.tree.map, np.asarray), (getattr(state, name), getattr(after, name))),
        )
        assert all(jax.tree.leaves(same)), name
    assert (int(after.skipped), int(after.streak), int(after.step)) == (1, 1, 1)
    better, _ = step(task(HEAD), after.replace(params=good.params), images())
    assert (int(better.skipped), int(better.streak), int(better.step)) == (1, 0, 2)


def test_remat_changes_no_gradient(start):
    after, _ = step(task(), start[PHASE], images())
    again, _ = step(task(remat=True), start[PHASE], images())
    moments = jax.tree.map(np.asarray, (after.opt_state, again.opt_state))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), *moments)


@pytest.mark.parametrize(
    "axes", [{"replica": 2, "fsdp": 2}, pytest.param({"replica": 4}, marks=pytest.mark.slow)]
)
def test_a_mesh_takes_the_same_step(start, axes):
    mesh, x = sharding.make_mesh(**axes, devices=jax.devices()[:4]), images()
    alone, of_alone = step(task(HEAD), start[HEAD], x)
    _, create = on_mesh(lambda: task(HEAD).init(jax.random.key(1)), mesh)
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, sharding.batch_sharding(mesh))
        spread, of_spread = step(task(HEAD), create(), rows)
    for name, value in of_alone.items():
        np.testing.assert_allclose(of_spread[name], value, rtol=1e-4, err_msg=name)
    moments = jax.tree.map(np.asarray, (alone.opt_state, spread.opt_state))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), *moments)
    if "fsdp" in axes:
        kernel = spread.params["autoencoder"]["encoder"]["stage_2"]["blocks"]["qkv"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


def test_adversarial_without_its_last_layer_is_refused():
    with pytest.raises(UserError, match="adversarial=0.5.*decoder/conv_out"):
        task(dataclasses.replace(HEAD, trainable=("decoder/conv_in/.*",)))
