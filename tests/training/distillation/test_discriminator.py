"""LADD's heads against torch with the same weights; spectral norm, groups, gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from sana_jax.sharding import make_mesh, shardings_for
from sana_jax.training.distillation.discriminator import Discriminator
from tests.toy import assert_close, devices, randomise

BATCH, TOKENS, WIDTH, HEADS = 16, 12, 24, 2


def features(batch=BATCH):
    rng = np.random.default_rng(0)
    shape = (batch, TOKENS, WIDTH)
    return tuple(2 * rng.standard_normal(shape, np.float32) + 0.5 for _ in range(HEADS))


class GroupedBatchNorm(torch.nn.Module):
    """torch's own batch norm, without running statistics, of eight samples at a time."""

    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width, track_running_stats=False)

    def forward(self, x):
        return torch.cat([self.norm(group) for group in x.split(8)])


def conv(width, taps, features):
    options = dict(padding=taps // 2, padding_mode="circular")
    return torch.nn.utils.spectral_norm(torch.nn.Conv1d(width, features, taps, **options))


class Twin(torch.nn.Module):
    """A head in torch's modules. The convolutions before a norm have the biases of upstream."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.conv_in, self.norm_in = conv(width, 1, width), GroupedBatchNorm(width)
        self.conv_mix, self.norm_mix = conv(width, 9, width), GroupedBatchNorm(width)
        self.conv_out = conv(width, 1, 1)

    def forward(self, x):
        relu = torch.nn.LeakyReLU(0.2)
        x = relu(self.norm_in(self.conv_in(x.transpose(1, 2))))
        x = (x + relu(self.norm_mix(self.conv_mix(x)))) / 2**0.5
        return self.conv_out(x)[:, 0]


def ours(conv_or_norm):
    """The parameters and the state of one layer of the twin."""
    own = {name: x.detach().clone().numpy() for name, x in conv_or_norm.state_dict().items()}
    if "norm.weight" in own:
        return {"scale": own["norm.weight"], "bias": own["norm.bias"]}, None
    kernel = own["weight_orig"].transpose(2, 1, 0)
    left = own["weight_v"].reshape(kernel.shape[1], -1).T.ravel()  # (C, taps) in torch
    params = {"kernel": kernel, "bias": own["bias"]}
    if kernel.shape[-1] > 1:
        del params["bias"]  # without effect
    return params, {"vectors": {"left": left, "right": own["weight_u"]}}


def variables(twins):
    params, state = {}, {}
    for i, twin in enumerate(twins):
        layers = {name: ours(layer) for name, layer in twin.named_children()}
        params[f"head_{i}"] = {name: pair[0] for name, pair in layers.items()}
        state[f"head_{i}"] = {name: pair[1] for name, pair in layers.items() if pair[1]}
    return {"params": params, "spectral": state}


@pytest.fixture(scope="module")
def twins():
    return [randomise(Twin(), seed) for seed in range(HEADS)]


@pytest.fixture(scope="module")
def fresh():
    return nn.unbox(jax.jit(Discriminator().init)(jax.random.key(0), features()))


def theirs(twins, inputs):
    return torch.cat([twin(x) for twin, x in zip(twins, inputs, strict=True)], dim=1)


@partial(jax.jit, static_argnames=("update", "module"))
def apply(variables, inputs, update=False, module=None):
    mutable = ["spectral"] if update else False
    return (module or Discriminator()).apply(variables, inputs, update, mutable=mutable)


def test_has_the_twin_s_weights(twins, fresh):
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables(twins))


def test_agrees_with_torch_frozen_and_while_it_trains(twins):
    own, inputs = variables(twins), features()
    tensors = [torch.from_numpy(x) for x in inputs]
    for twin in twins:
        twin.eval()
    expected = theirs(twins, tensors).detach()
    assert_close(apply(own, inputs), expected, 1e-5, "frozen")
    for twin in twins:
        twin.train()
    state = own["spectral"]
    for step in range(2):
        expected = theirs(twins, tensors).detach()
        logits, state = apply({**own, "spectral": state}, inputs, update=True)
        state = state["spectral"]
        assert_close(logits, expected, 1e-5, f"step {step}")
    expected = variables(twins)["spectral"]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), state, expected)


def test_gradients_agree_with_torch(twins):
    own, inputs = variables(twins), features()
    tensors = [torch.from_numpy(x).requires_grad_() for x in inputs]
    for twin in twins:
        twin.eval()
        twin.zero_grad()
    torch.sin(theirs(twins, tensors)).mean().backward()

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(params, inputs):
        logits = Discriminator().apply({**own, "params": params}, inputs)
        return jnp.sin(logits).mean()

    of_params, of_inputs = gradient(own["params"], inputs)
    for mine, tensor in zip(of_inputs, tensors, strict=True):
        assert_close(mine, tensor.grad, 1e-4, "features")
    for i, twin in enumerate(twins):
        head = of_params[f"head_{i}"]
        for name in ("conv_in", "conv_mix", "conv_out"):
            weight = getattr(twin, name).weight_orig.grad.permute(2, 1, 0)
            assert_close(head[name]["kernel"], weight, 1e-4, name)
        for name in ("norm_in", "norm_mix"):
            norm = getattr(twin, name).norm
            assert_close(head[name]["scale"], norm.weight.grad, 1e-4, name)
            assert_close(head[name]["bias"], norm.bias.grad, 1e-4, name)
        assert_close(head["conv_out"]["bias"], twin.conv_out.bias.grad, 1e-4, "bias")
        # A bias before a norm trains without effect: ours are left out.
        assert twin.conv_mix.bias.grad.abs().max() < 1e-6


def test_starts_with_kernels_of_norm_one(fresh):
    for head, layers in fresh["params"].items():
        for name in ("conv_in", "conv_mix", "conv_out"):
            matrix = layers[name]["kernel"].reshape(-1, layers[name]["kernel"].shape[-1])
            vectors = fresh["spectral"][head][name]["vectors"]
            estimate = vectors["left"] @ matrix @ vectors["right"]
            assert estimate == pytest.approx(np.linalg.norm(matrix, 2), rel=0.05)


def test_the_groups_of_eight_do_not_see_each_other(fresh):
    inputs = features()
    changed = tuple(x + np.where(np.arange(BATCH) < 8, 0, 1)[:, None, None] * x**2 for x in inputs)
    before, after = (np.asarray(apply(fresh, x)) for x in (inputs, changed))
    np.testing.assert_allclose(before[:8], after[:8], atol=1e-5)
    assert np.abs(before[8:] - after[8:]).max() > 0.1
    with pytest.raises(ValueError, match="batch of 9"):
        apply(fresh, features(9))
    assert apply(fresh, features(5)).shape == (5, HEADS * TOKENS)


def test_tokens_are_a_ring(fresh):
    inputs = features()
    logits = np.asarray(apply(fresh, inputs)).reshape(BATCH, HEADS, TOKENS)
    rolled = apply(fresh, tuple(np.roll(x, 5, axis=1) for x in inputs))
    rolled = np.asarray(rolled).reshape(logits.shape)
    np.testing.assert_allclose(rolled, np.roll(logits, 5, axis=2), atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(fresh):
    inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in features())
    exact = np.asarray(apply(fresh, inputs))
    logits = apply(fresh, inputs, module=Discriminator(dtype=jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


def test_weights_shard_and_logits_stay(fresh):
    inputs = features()
    abstract = jax.eval_shape(Discriminator().init, jax.random.key(0), inputs)
    mesh = make_mesh(replica=2, fsdp=2, devices=devices(4))
    sharded = jax.device_put(fresh, shardings_for(abstract, mesh))
    assert "fsdp" in sharded["params"]["head_0"]["conv_mix"]["kernel"].sharding.spec
    with jax.set_mesh(mesh):
        logits = jax.jit(Discriminator().apply)(sharded, inputs)
    np.testing.assert_allclose(logits, apply(fresh, inputs), atol=1e-5)
