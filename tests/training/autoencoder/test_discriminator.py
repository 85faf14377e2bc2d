"""PatchGAN against torch's layers with the same weights; its field of view and its norms."""

import functools
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from sana_jax.sharding import make_mesh, shardings_for
from sana_jax.training.autoencoder.discriminator import Discriminator
from tests.toy import assert_close, devices, randomise

SIZES = {"width": 8, "layers": 3}


def images(side=64, seed=0, batch=2):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)


def init(module, side=24):
    return nn.unbox(jax.jit(module.init)(jax.random.key(0), images(side))["params"])


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x):
    return module.apply({"params": params}, x)


class Normed(torch.nn.Module):
    """RMS norm over channels."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.bias = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def twin(norm, width=8, layers=3):
    """The PatchGAN of pix2pix in torch's own modules, with another norm instead of batch norm."""
    norms = {
        "group_norm": lambda c: torch.nn.GroupNorm(min(32, c), c),
        "rms_norm": Normed,
        "none": lambda c: torch.nn.Identity(),
    }
    widths = [3] + [width * min(2**i, 8) for i in range(layers + 1)]
    parts = {}
    for i in range(layers + 1):
        bias, stride = i == 0 or norm == "none", 2 if i < layers else 1
        parts[f"conv_{i}"] = torch.nn.Conv2d(widths[i], widths[i + 1], 4, stride, 1, bias=bias)
        if i:
            parts[f"norm_{i}"] = norms[norm](widths[i + 1])
        parts[f"act_{i}"] = torch.nn.LeakyReLU(0.2)
    parts["conv_out"] = torch.nn.Conv2d(widths[-1], 1, 4, 1, 1)
    return randomise(torch.nn.Sequential(OrderedDict(parts)))


def ours(torch_module):
    params = {}
    for key, value in torch_module.state_dict().items():
        layer, _, kind = key.rpartition(".")
        value = value.numpy()
        if value.ndim == 4:
            name, value = "kernel", value.transpose(2, 3, 1, 0)
        else:
            name = "scale" if kind == "weight" else "bias"
        params.setdefault(layer, {})[name] = value
    return params


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("norm", ["group_norm", "rms_norm", "none"])
def test_agrees_with_torch(norm, layers):
    theirs, x = twin(norm, layers=layers), images()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    module, params = Discriminator(width=8, layers=layers, norm=norm), ours(theirs)
    shapes = jax.tree.map(jnp.shape, init(module))
    assert shapes == jax.tree.map(jnp.shape, params)
    assert_close(apply(module, params, x), expected, 1e-5, f"{norm}, {layers}")


def test_the_published_size():
    module = Discriminator()
    params = jax.eval_shape(module.init, jax.random.key(0), images(256))["params"]
    leaves = jax.tree.leaves(nn.unbox(params))
    # The published network, whose norms have a scale and a bias too.
    assert sum(leaf.size for leaf in leaves) == 2_765_633
    out = jax.eval_shape(module.apply, {"params": params}, images(256))
    assert (out.shape, out.dtype) == ((2, 30, 30, 1), jnp.float32)


def test_starts_from_small_normal_weights():
    params = init(Discriminator(width=32))
    for name, layer in params.items():
        if name.startswith("conv"):
            assert np.std(layer["kernel"]) == pytest.approx(0.02, rel=0.1)
            assert not np.any(layer.get("bias", 0))


def test_a_logit_sees_70_pixels():
    module = Discriminator(width=4, norm="rms_norm")
    params, x = init(module), jnp.asarray(images(128))

    def logit(x):
        return module.apply({"params": params}, x)[0, 7, 7, 0]

    seen = np.abs(np.asarray(jax.jit(jax.grad(logit))(x)[0])).sum(-1) > 0
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == 70


@pytest.mark.parametrize("norm", ["group_norm", "rms_norm", "none"])
def test_an_image_is_judged_alone(norm):
    module = Discriminator(**SIZES, norm=norm)
    x = images(batch=3)
    params = init(module)
    together = apply(module, params, x)
    alone = apply(module, params, x[1:2])
    # XLA sums a convolution in another order for another batch: 1.1e-6 of 0.6 on some processors.
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    module = Discriminator(**SIZES, dtype=jnp.bfloat16)
    params, x = init(module), images()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = apply(module, params, x)
    assert logits.dtype == jnp.float32
    exact = apply(Discriminator(**SIZES), params, x)
    assert 0 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max() + 1e-3


def test_weights_shard_and_logits_stay():
    module, x = Discriminator(**SIZES), images(batch=4)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    mesh = make_mesh(replica=2, fsdp=2, devices=devices(4))
    params = init(module)
    sharded = jax.device_put(params, shardings_for(abstract, mesh))
    assert "fsdp" in sharded["conv_1"]["kernel"].sharding.spec
    with jax.set_mesh(mesh):
        logits = jax.jit(module.apply)({"params": sharded}, x)
    np.testing.assert_allclose(logits, apply(module, params, x), atol=1e-5)


def test_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="24 pixels"):
        init(Discriminator(**SIZES), 16)
    assert init(Discriminator(**SIZES), 24)
    with pytest.raises(ValueError, match="batch_norm"):
        init(Discriminator(**SIZES, norm="batch_norm"))
