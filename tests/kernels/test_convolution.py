"""Convolutions and their gradients against torch in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from sana_jax.kernels.convolution import convolve, convolve_doubled
from tests import toy


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def as_torch(array, order):
    return torch.from_numpy(np.array(array)).double().permute(order).requires_grad_()


def value_and_gradients(function, x, kernel, cotangent):
    value, pull = jax.vjp(function, x, kernel)
    return value, *pull(cotangent)


def check(ours, theirs, x, kernel):
    """Value and both gradients of our function and of torch's, at a random cotangent."""
    x_torch, kernel_torch = as_torch(x, (0, 3, 1, 2)), as_torch(kernel, (3, 2, 0, 1))
    y = theirs(x_torch, kernel_torch)
    cotangent = torch.from_numpy(normal(*y.shape)).double()
    y.backward(cotangent)
    found = jax.jit(value_and_gradients, static_argnums=0)(
        ours, x, kernel, cotangent.float().permute(0, 2, 3, 1).numpy()
    )
    expected = (
        y.detach().permute(0, 2, 3, 1),
        x_torch.grad.permute(0, 2, 3, 1),
        kernel_torch.grad.permute(2, 3, 1, 0),
    )
    for what, a, b in zip(("value", "d x", "d kernel"), found, expected, strict=True):
        toy.assert_close(a, b, 1e-6, what)


@pytest.mark.parametrize(
    "size, stride, padding",
    [(3, 1, 1), (3, 2, 1), (4, 2, 1), (4, 1, 1), (2, 1, 1), (2, 1, 0), (5, 3, 2), (1, 2, 0)],
)
@pytest.mark.parametrize("height, width", [(8, 11), (5, 6)])
def test_convolve(size, stride, padding, height, width):
    def theirs(x, kernel):
        return functional.conv2d(x, kernel, stride=stride, padding=padding)

    def ours(x, kernel):
        return convolve(x, kernel, stride, padding)

    check(ours, theirs, normal(2, height, width, 3), normal(size, size, 3, 4))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 4), (5, 3)])
def test_convolve_doubled(height, width):
    def theirs(x, kernel):
        return functional.conv2d(functional.interpolate(x, scale_factor=2), kernel, padding=1)

    check(convolve_doubled, theirs, normal(2, height, width, 3), normal(3, 3, 3, 5))


def test_second_derivative():
    """What a gradient penalty needs."""
    x, kernel = normal(1, 5, 4, 2), normal(3, 3, 2, 3)

    def steepness(kernel):
        return jnp.sum(jax.grad(lambda x: jnp.sum(convolve(x, kernel) ** 2))(x) ** 2)

    def difference(direction, step=1e-2):
        return (steepness(kernel + step * direction) - steepness(kernel - step * direction)) / (
            2 * step
        )

    direction = normal(*kernel.shape)
    found = jnp.vdot(jax.grad(steepness)(kernel), direction)
    np.testing.assert_allclose(found, difference(direction), rtol=1e-3)


@pytest.mark.parametrize("function", [convolve, convolve_doubled])
def test_gradients_inside_a_loop_keep_the_order_that_is_fast_on_cpu(function):
    def loss(x, kernels):
        def body(x, kernel):
            return jnp.tanh(function(x, kernel)[:, : x.shape[1], : x.shape[2]]), None

        return jnp.sum(jax.lax.scan(body, x, kernels)[0])

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    compiled = gradient.lower(normal(2, 8, 8, 4), normal(3, 3, 3, 4, 4)).compile().as_text()
    orders = re.findall(r" convolution\(.*?dim_labels=(\S+?)[,\s]", compiled)
    assert len(orders) >= 3 and set(orders) == {"b01f_01io->b01f"}
