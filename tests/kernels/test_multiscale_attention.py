"""The kernel of multi-scale attention against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.multiscale_attention import api, multiscale_attention, reference, tpu
from sana_jax.sharding import make_mesh
from tests.kernels.helpers import TOLERANCE, kernel_of, normal, relative_error


def attend(qkv, scales, head_dim):
    """Head by head, with one sum over the taps and one over the pixels."""
    batch, height, width, channels = qkv.shape
    images = [qkv]
    for depthwise, pointwise in scales:
        size = len(depthwise)
        padded = np.pad(qkv, ((0, 0), *[(size // 2,) * 2] * 2, (0, 0)))
        x = sum(
            padded[:, i : i + height, j : j + width] * depthwise[i, j]
            for i, j in np.ndindex(size, size)
        )
        groups = x.reshape(batch, height, width, -1, head_dim)
        images.append(np.einsum("bhwgd,gde->bhwge", groups, pointwise).reshape(qkv.shape))
    heads = np.concatenate(images, -1).reshape(batch, height * width, -1, 3, head_dim)
    q, k, v = (heads[:, :, :, i] for i in range(3))
    weights = np.einsum("bqhd,bkhd->bhqk", np.maximum(q, 0), np.maximum(k, 0))
    out = np.einsum("bhqk,bkhd->bqhd", weights, v) / (weights.sum(-1).transpose(0, 2, 1)[..., None])
    return out.reshape(batch, height, width, -1)


def arrays(shape, head_dim, sizes):
    channels = shape[-1]
    pairs = [
        (normal(size, size, channels) / size, normal(channels // head_dim, head_dim, head_dim) / 6)
        for size in sizes
    ]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (normal(*shape), tuple(pairs)))


@pytest.mark.parametrize(
    "shape, head_dim, sizes",
    [
        ((2, 4, 16, 384), 32, (5,)),  # one product for all rows
        ((1, 18, 32, 384), 64, (1, 3)),  # several, and a border wider than a scale's
        ((1, 4, 16, 768), 32, (3,)),  # two groups of heads
        ((1, 4, 16, 384), 32, ()),
    ],
)
def test_kernel_on_tpu(on_tpu, monkeypatch, shape, head_dim, sizes):
    monkeypatch.setattr(api, "by_platform", kernel_of("tpu"))
    qkv, scales = arrays(shape, head_dim, sizes)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), (qkv, scales))
    expected = attend(*exact, head_dim)
    found = jax.jit(lambda *args: multiscale_attention(*args, head_dim, "pallas"))(qkv, scales)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found, expected) < TOLERANCE["bfloat16"]
    plain = reference.multiscale_attention(qkv, scales, head_dim)
    assert relative_error(plain, expected) < TOLERANCE["bfloat16"]


def test_gradient_is_that_of_the_plain_form():
    """Also on a mesh, where a device rounds the gradient of its own pictures to bfloat16."""
    qkv, scales = arrays((4, 4, 16, 384), 32, (3,))

    def gradients(implementation):
        def loss(*args):
            out = multiscale_attention(*args, 32, implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(qkv, scales))

    plain, alone = gradients("xla"), gradients("pallas")
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        split = gradients("pallas")
    for found, tolerance in (alone, 1e-6), (split, TOLERANCE["bfloat16"]):
        for one, expected in zip(found, plain, strict=True):
            assert relative_error(one, expected) < tolerance


def test_images_without_a_kernel():
    supported = tpu.supported
    assert supported(128, 128, 1536, 32, (5,)) and supported(64, 64, 3072, 32, ())
    assert not supported(64, 64, 3 * 64, 32, (5,))  # half a group of heads
    assert not supported(64, 64, 3072, 48, (5,))
    assert not supported(64, 72, 3072, 32, (5,))
    assert not supported(64, 64, 3072, 32, (19,))  # wider than the border
    assert not supported(256, 256, 3072, 32, (5,))
