"""Mix-FFN against its formula in float64: the plain form, and the kernels both ways."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels import scaled_product
from sana_jax.kernels.glumbconv import api, glumbconv, gpu, reference, tpu
from tests import toy
from tests.kernels.helpers import TOLERANCE, check, kernel_of, normal, projected, run_public

single = partial(normal, dtype=np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def convolve(x, kernel):
    """Pixel by pixel, from the definition."""
    size = len(kernel)
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    out = np.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = np.einsum("bhwc,hwc->bc", padded[:, i : i + size, j : j + size], kernel)
    return out


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 1, 9, 2)])
def test_depthwise_conv(shape, size):
    x, kernel = single(*shape), single(size, size, shape[-1])
    found = jax.jit(reference.depthwise_conv)(x, kernel)
    toy.assert_close(found, convolve(x.astype(np.float64), kernel.astype(np.float64)), 1e-6)


def test_gradients_of_depthwise_conv():
    """It is linear in either argument: <dy, f(x, k)> gives every gradient, in float64."""
    x, kernel, dy = single(2, 5, 7, 3), single(3, 3, 3), single(2, 5, 7, 3)
    found = jax.jit(lambda *a: jax.vjp(reference.depthwise_conv, *a[:2])[1](a[2]))(x, kernel, dy)

    def gradient(of):
        """By unit vectors."""
        ones = np.eye(of.size).reshape(-1, *of.shape)
        return np.array([np.vdot(dy, value(one)) for one in ones]).reshape(of.shape)

    def value(one):
        pair = (one, kernel) if one.shape == x.shape else (x, one)
        return convolve(*(t.astype(np.float64) for t in pair))

    for a, b in zip(found, map(gradient, (x, kernel)), strict=True):
        toy.assert_close(a, b, 1e-6)


def test_plain_form():
    x, kernel = single(2, 5, 4, 12), single(3, 3, 12)
    bias, depthwise_bias = single(12), single(12)
    u = convolve(silu(x.astype(np.float64) + bias), kernel.astype(np.float64)) + depthwise_bias
    toy.assert_close(
        jax.jit(reference.glumbconv)(x, bias, kernel, depthwise_bias),
        u[..., :6] * silu(u[..., 6:]),
        1e-6,
    )


def test_plain_form_can_be_differentiated():
    x, kernel, bias = single(1, 3, 4, 8), single(3, 3, 8), single(8)
    gate = jax.grad(lambda *a: jnp.sum(reference.glumbconv(*a) ** 2), argnums=(0, 1, 2, 3))
    for gradient in jax.jit(gate)(x, bias, kernel, bias):
        assert np.isfinite(gradient).all() and np.any(gradient)


def mix_ffn_middle(value, gate, bias, kernel, depthwise_bias):
    u = jax.nn.silu(jnp.concatenate([value, gate], axis=-1) + bias)
    height, width = u.shape[1:3]
    u = jnp.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = (u[:, i : i + height, j : j + width] * kernel[i, j] for i, j in np.ndindex(3, 3))
    value, gate = jnp.split(sum(shifts) + depthwise_bias, 2, axis=-1)
    return value * jax.nn.silu(gate)


def run_on_tpu(arrays, cotangent):
    value, gate, *weights = arrays
    operands = (value, gate, *api.by_halves(*weights))
    out, *gradients = tpu.backward(*operands, cotangent)
    return (tpu.forward(*operands), out), gradients


def run_on_gpu(arrays, cotangent, together):
    """`together`: value and gate are one array."""
    value, gate, *weights = arrays
    images = (jnp.concatenate([value, gate], axis=-1),) if together else (value, gate)
    operands = (images, *api.by_halves(*weights))
    out, d_images, *gradients = gpu.backward(*operands, cotangent)
    halves = jnp.split(d_images[0], 2, axis=-1) if together else d_images
    return (gpu.forward(*operands), out), [*halves, *gradients]


def glumbconv_arrays(batch, height, width, channels):
    image = batch, height, width, channels
    wide = 2 * channels
    return normal(*image), normal(*image), normal(wide), normal(3, 3, wide), normal(wide)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 4, 8, 128), (1, 5, 6, 200), (1, 3, 16, 40)])
def test_kernel_on_tpu(on_tpu, shape, dtype):
    check(run_on_tpu, mix_ffn_middle, glumbconv_arrays(*shape), dtype)


@pytest.mark.parametrize(
    "shape, dtype, together",
    [((2, 4, 4, 64), "bfloat16", True), ((1, 11, 3, 40), "float32", False)],
)
def test_kernel_on_gpu(on_gpu, monkeypatch, shape, dtype, together):
    """Also with rows in strips of three, columns and channels that do not fill their blocks."""
    monkeypatch.setattr(gpu, "ROWS", 3)
    run = partial(run_on_gpu, together=together)
    check(run, mix_ffn_middle, glumbconv_arrays(*shape), dtype)


def middle_and_product(*arrays):
    *arrays, projection, scale = arrays
    return mix_ffn_middle(*arrays) @ projection * scale


PROJECTED = *glumbconv_arrays(2, 4, 8, 40), normal(40, 24), normal(2, 1, 1, 24)


def test_kernels_of_split_rows(split_tokens):
    """Biases of all signs: what stands outside the image must not pass through SiLU as a zero."""
    check(partial(run_public, partial(projected, True)), middle_and_product, PROJECTED, "float32")


def run_on(platform, monkeypatch):
    for module in (api, scaled_product):
        monkeypatch.setattr(module, "by_platform", kernel_of(platform))


@pytest.mark.parametrize("platform", ["tpu", "other"])
def test_projected_glumbconv(on_tpu, monkeypatch, platform):
    """Without a mesh, by the kernels and in the plain form."""
    run_on(platform, monkeypatch)
    check(partial(run_public, partial(projected, False)), middle_and_product, PROJECTED, "float32")


@pytest.mark.parametrize(
    "implementation, platform", [("xla", "tpu"), ("pallas", "other"), ("pallas", "tpu")]
)
def test_the_whole_of_mix_ffn(on_tpu, monkeypatch, implementation, platform):
    run_on(platform, monkeypatch)

    def run(x, expand, bias, depthwise_kernel, depthwise_bias, contract, scale):
        weights = bias, depthwise_kernel, depthwise_bias
        return glumbconv(x, expand, weights, contract, scale, implementation=implementation)

    def formula(x, expand, *arrays):
        return middle_and_product(*jnp.split(x @ expand, 2, axis=-1), *arrays)

    arrays = normal(2, 4, 8, 24), normal(24, 80) / 5, *PROJECTED[2:]
    check(partial(run_public, run), formula, arrays, "float32")


@pytest.mark.parametrize("hidden, barriers", [(128, 0), (40, 1)])
def test_halves_inside_a_tile_are_cut_first_for_a_tpu(hidden, barriers):
    """Not where a gradient is taken, and the halves are the same."""
    kernel = jnp.asarray(single(8, 2 * hidden))

    def text(fn, *args):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()

    def both(kernel):
        return jax.value_and_grad(lambda kernel: jnp.sum(api._halves(kernel)[1] ** 2))(kernel)

    assert text(api._halves, kernel).count("optimization_barrier") == barriers
    assert "optimization_barrier" not in text(both, kernel)
    np.testing.assert_array_equal(jnp.concatenate(api._halves(kernel), axis=1), kernel)
    np.testing.assert_array_equal(both(kernel)[1][:, hidden:], 2 * kernel[:, hidden:])
