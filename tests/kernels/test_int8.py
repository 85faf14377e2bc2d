"""Products of int8, against integers that NumPy computes by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sana_jax.kernels.glumbconv import api as glumbconv
from sana_jax.kernels.int8 import Quantised, Simulated, Watched, multiply, reference
from tests.kernels.helpers import kernel_of, relative_error

ROWS = {
    # The largest is 127, so that the scale is 1 and halves are halves.
    "ties": [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3, -127, 0.49999997],
    "zeros": [0.0] * 12,
    "minus zero": [-0.0] * 12,
    "outlier": [1e30, *[1.0] * 11],
    "tiny": [1e-38, *[-1e-38] * 11],
    "subnormal scale": [1e-37, *[0.0] * 11],
    "one number": [3.0, *[0.0] * 11],
    "all the same": [-7.3] * 12,
    "large": [3e38, -3e38, *[1e38] * 10],
}


def numpy_product(x, values, scale, row_scale=None):
    """The specification again, in float32 and int64 of NumPy."""
    x, third = np.asarray(x, np.float32), np.float32(1 / 127)
    if row_scale is None:
        row_scale = np.abs(x).max(-1, keepdims=True) * third
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inverse = np.where(row_scale > 1e-30, np.float32(1) / row_scale, np.float32(0))
        rounded = np.rint(x * inverse.astype(np.float32)).clip(-127, 127).astype(np.int64)
        return rounded, (rounded @ values.astype(np.int64)).astype(np.float32) * row_scale * scale


def weight(inputs, outputs, seed=0, **fields) -> Quantised:
    """Values up to -128, which we never write but others may."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-128, 128, (inputs, outputs)).astype(np.int8)
    values[0, :2] = -128, 127
    scale = rng.uniform(0.001, 0.1, (1, outputs)).astype(np.float32)
    return Quantised(jnp.asarray(values), jnp.asarray(scale), **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_is_that_of_integers_to_the_bit(dtype):
    kernel = weight(12, 7, rows="int8")
    x = np.array([*ROWS.values(), *np.random.default_rng(1).standard_normal((50, 12))])
    x = x.astype(np.float32).astype(dtype if dtype == "float32" else ml_dtypes.bfloat16)
    rounded, expected = numpy_product(x, *map(np.asarray, (kernel.values, kernel.scale)))
    own = reference.scale_of(jnp.asarray(x))
    found = jax.jit(reference.values_of)(jnp.asarray(x), own)
    np.testing.assert_array_equal(found, rounded)
    for form in multiply, jax.jit(multiply):
        y = np.asarray(form(jnp.asarray(x), kernel))
        np.testing.assert_array_equal(y, expected.astype(x.dtype))
    if dtype == "float32":
        ties = dict(zip(ROWS, rounded, strict=False))["ties"]
        assert [*ties] == [127, 0, 2, 2, 0, -2, -2, 126, -126, 3, -127, 0]


def test_long_sums_are_exact_where_float32_is_not():
    kernel = weight(5600, 3, rows="int8")
    x = np.random.default_rng(2).uniform(0.9, 1, (2, 3, 5600)).astype(np.float32)
    kernel = dataclasses.replace(kernel, values=jnp.abs(kernel.values.astype(int)).astype("int8"))
    arrays = map(np.asarray, (kernel.values, kernel.scale))
    rounded, expected = numpy_product(x, *arrays)
    assert (rounded @ np.asarray(kernel.values, np.int64)).max() > 2**24
    np.testing.assert_array_equal(jax.jit(multiply)(x, kernel), expected)


def test_rows_of_a_given_range_are_clipped():
    kernel = weight(12, 7, rows="int8", range=jnp.float32(0.01))
    x = np.linspace(-2, 2, 24).reshape(2, 12).astype(np.float32)
    arrays = map(np.asarray, (kernel.values, kernel.scale))
    rounded, expected = numpy_product(x, *arrays, row_scale=np.float32(0.01))
    assert {rounded.min(), rounded.max()} == {-127, 127}
    np.testing.assert_array_equal(jax.jit(multiply)(x, kernel), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", ["float", "int8"])
def test_what_is_not_finite_shows_in_its_row_alone(bad, rows):
    kernel = weight(12, 7, rows=rows)
    x = np.ones((3, 12), np.float32)
    x[1, 4] = bad
    y = np.asarray(multiply(jnp.asarray(x), kernel))
    assert not np.isfinite(y[1]).any() and np.isfinite(y[[0, 2]]).all()


def test_weights_alone_lose_nothing_beside_their_own_rounding():
    kernel = weight(300, 40)
    x = np.random.default_rng(3).standard_normal((9, 300)).astype(np.float32)
    exact = x.astype(np.float64) @ (np.asarray(kernel.values, np.float64) * kernel.scale)
    assert relative_error(multiply(x, kernel), exact) < 1e-6
    assert relative_error(multiply(x, kernel), multiply(x, kernel.astype("float32"))) < 1e-6
    narrow = multiply(x.astype(ml_dtypes.bfloat16), kernel)
    assert narrow.dtype == "bfloat16" and relative_error(narrow, exact) < 4e-3


@pytest.mark.parametrize("rows", ["float", "int8"])
def test_gradient_of_rows_is_that_of_the_weights_that_integers_stand_for(rows):
    kernel = weight(12, 7, rows=rows)
    x = np.random.default_rng(4).standard_normal((2, 5, 12)).astype(np.float32)
    cotangent = np.random.default_rng(5).standard_normal((2, 5, 7)).astype(np.float32)
    _, pull_back = jax.vjp(lambda x: multiply(x, kernel), x)
    _, expected = jax.vjp(lambda x: multiply(x, kernel.astype("float32")), x)
    assert relative_error(pull_back(cotangent)[0], expected(cotangent)[0]) < 1e-6


@pytest.mark.parametrize("rows", ["float", "int8"])
def test_mix_ffn_takes_quantised_weights_with_and_without_its_kernel(monkeypatch, on_tpu, rows):
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 32)), jnp.float32)
    depthwise = jnp.asarray(rng.standard_normal((3, 3, 64)), jnp.float32)
    weights = jnp.ones(64), depthwise, jnp.ones(64)
    expand, contract = weight(32, 64, rows=rows), weight(32, 32, seed=1, rows=rows)

    def loss(x, implementation):
        y = glumbconv.glumbconv(x, expand, weights, contract, implementation=implementation)
        return jnp.sum(y**2), y

    plain = jax.value_and_grad(loss, has_aux=True)(x, "xla")
    monkeypatch.setattr(glumbconv, "by_platform", kernel_of("tpu"))
    monkeypatch.setattr(glumbconv, "uses_kernel", lambda *_: True)
    by_kernel = jax.value_and_grad(loss, has_aux=True)(x, "pallas")
    # A number near a half may be rounded the other way.
    assert relative_error(by_kernel[0][1], plain[0][1]) < 5e-3
    assert relative_error(by_kernel[1], plain[1]) < 5e-3


PRODUCTS = frozenset({"forward", "rows", "weights"})


def exact_gradients(x, kernel, cotangent):
    flat = cotangent.reshape(-1, cotangent.shape[-1])
    return cotangent @ kernel.T, x.reshape(-1, x.shape[-1]).T @ flat


@pytest.mark.parametrize("products", [frozenset(), *map(frozenset, [["rows"], PRODUCTS])])
def test_simulated_products_are_rounded_where_it_is_said(products):
    rng = np.random.default_rng(7)
    x, cotangent = (rng.standard_normal((2, 50, n)).astype(np.float32) for n in (60, 40))
    kernel = rng.standard_normal((60, 40)).astype(np.float32)

    def run(x, kernel):
        return multiply(x, Simulated(kernel, products))

    y, pull_back = jax.vjp(run, jnp.asarray(x), jnp.asarray(kernel))
    found = y, *pull_back(cotangent)
    exact = x @ kernel, *exact_gradients(x, kernel, cotangent)
    for name, ours, theirs in zip(("forward", "rows", "weights"), found, exact, strict=True):
        error = relative_error(ours, theirs)
        assert 2e-3 < error < 0.02 if name in products else error < 1e-6, name


def of_scale(x, gradient, axis):
    """What the largest number of each row or column gets, as it sets the scale of all others."""
    largest = np.abs(x).max(axis, keepdims=True)
    steps = x / (largest / 127)
    by_scale = (gradient * (np.round(steps) - steps)).sum(axis, keepdims=True)
    return np.where(np.abs(x) == largest, by_scale * np.sign(x) / 127, 0)


def test_the_gradient_of_a_simulated_product_knows_of_the_scale():
    rng = np.random.default_rng(9)
    x, cotangent = rng.standard_normal((50, 60)), rng.standard_normal((50, 40))
    kernel = rng.standard_normal((60, 40))

    def run(x, kernel):
        return multiply(x, Simulated(kernel, frozenset({"forward"})))

    _, pull_back = jax.vjp(run, *(jnp.asarray(a, jnp.float32) for a in (x, kernel)))
    found = pull_back(jnp.asarray(cotangent, jnp.float32))
    straight = exact_gradients(x, kernel, cotangent)
    for ours, plain, a, axis in zip(found, straight, (x, kernel), (-1, 0), strict=True):
        added = of_scale(a, plain, axis)
        assert relative_error(ours, plain + added) < 1e-5
        assert np.linalg.norm(added) > 1e-3 * np.linalg.norm(plain)


def test_a_simulated_product_is_the_one_of_the_weights_once_they_are_stored():
    rng = np.random.default_rng(8)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in [(5, 60), (60, 40)])
    scale = reference.scale_of(jnp.asarray(kernel), 0)
    stored = Quantised(reference.values_of(jnp.asarray(kernel), scale), scale, rows="int8")
    simulated = multiply(x, Simulated(jnp.asarray(kernel), PRODUCTS))
    np.testing.assert_array_equal(multiply(x, stored), simulated)


def test_watched_weights_tell_of_every_channel_and_layer():
    told = {}

    def tell(name, layer, largest):
        told[name, int(layer)] = np.asarray(largest)

    rng = np.random.default_rng(9)
    kernels = rng.standard_normal((3, 12, 12)).astype(np.float32)
    x = rng.standard_normal((2, 5, 12)).astype(np.float32)

    def run(x):
        stack = Watched(jnp.asarray(kernels), jnp.arange(3), "a/b", tell)
        return jax.lax.scan(lambda x, kernel: (multiply(x, kernel), x), x, stack)

    y, rows = jax.jit(run)(x)
    jax.effects_barrier()
    assert_same = np.testing.assert_array_equal
    for layer in range(3):
        assert_same(told["a/b", layer], np.abs(rows[layer]).max((0, 1)))
    assert len(told) == 3 and relative_error(y, x @ kernels[0] @ kernels[1] @ kernels[2]) < 1e-6
