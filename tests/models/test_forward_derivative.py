"""The forward derivative of the whole transformer, and of each of its operations.

It is compared with central differences of the same function in float64, for which the name
jnp.float32 stands for float64 while it is traced: the network sums in float32 by that name.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sana_jax.checkpoints.components import init_params, module_for
from sana_jax.kernels import bias, glumbconv, linear_attention
from sana_jax.kernels.cross_attention import cross_attention
from sana_jax.kernels.glumbconv.reference import depthwise_conv
from sana_jax.kernels.modulated_norm import modulated_norm
from sana_jax.models.dit import SPRINT, SanaConfig
from tests import toy

rng = np.random.default_rng(0)
ROWS = 5


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def check(monkeypatch, fn, arrays, moves, tolerance, step=1e-5):
    """The derivative in float32, of `arrays` along `moves`, is that of differences in float64.

    An array whose move is None stands still, and is a constant.
    """
    moving = [i for i, move in enumerate(moves) if move is not None]

    def of_moving(*moved):
        return fn(*(moved[moving.index(i)] if i in moving else x for i, x in enumerate(arrays)))

    given = tuple(tuple(x[i] for i in moving) for x in (arrays, moves))
    _, found = jax.jit(partial(jax.jvp, of_moving))(*given)
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        exact = [np.float64(x) for x in arrays]
        along = [0.0 if move is None else np.float64(move) for move in moves]

        @jax.jit
        def at(h):
            return fn(*(x + h * d for x, d in zip(exact, along, strict=True)))

        assert jax.eval_shape(at, 0.0).dtype == np.float64
        expected = (at(step) - at(-step)) / (2 * step)
    toy.assert_close(found, expected, tolerance)


MASK = np.arange(ROWS)[None] < np.array([[ROWS], [2]])
OPERATIONS = {
    "add_bias": (bias.add_bias, normal(2, 6, 4), normal(4)),
    "depthwise_conv": (depthwise_conv, normal(2, 4, 3, 6), normal(3, 3, 6)),
    "glumbconv": (
        lambda x, expand, *rest: glumbconv.glumbconv(
            x, expand, rest[:3], *rest[3:], implementation="xla"
        ),
        *(normal(2, 4, 3, 6), normal(6, 8), normal(8), normal(3, 3, 8), normal(8), normal(4, 6)),
    ),
    "linear_attention": (
        lambda x: linear_attention.linear_attention(x, 4, implementation="xla"),
        normal(2, 12, 3 * 8),
    ),
    "cross_attention": (
        lambda q, kv: cross_attention(q, kv, jnp.asarray(MASK), 2, "xla"),
        *(normal(2, 12, 8), normal(2, ROWS, 16)),
    ),
    "modulated_norm": (
        lambda *args: modulated_norm(*args, "xla")[1],
        *(normal(2, 12, 8), normal(2, 1, 8), normal(2, 1, 8)),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(monkeypatch, name):
    """All arguments move, then each alone: where one stands still, its terms are left out."""
    fn, *arrays = OPERATIONS[name]
    moves = [normal(*x.shape) for x in arrays]
    for i in range(len(arrays)) if len(arrays) > 1 else ():
        alone = [move if i == j else None for j, move in enumerate(moves)]
        check(monkeypatch, fn, arrays, alone, 2e-6)
    check(monkeypatch, fn, arrays, moves, 2e-6)


def test_network(monkeypatch):
    """As the loss moves it: the latents and the time, and guidance and text stand still."""
    config = SanaConfig(
        depth=2,
        width=32,
        head_dim=8,
        latent_channels=4,
        cross_heads=2,
        caption_channels=6,
        **SPRINT,
    )
    module = module_for(config, "float32").clone(implementation="xla")
    shapes = nn.unbox(jax.eval_shape(partial(init_params, module), jax.random.key(0)))
    params = jax.tree.map(lambda x: normal(*x.shape) / max(x.shape) ** 0.5, shapes)
    caption, guidance = normal(2, ROWS, 6), np.array([4.5, 2.0], np.float32)

    def fn(latents, time):
        exact = module.clone(dtype=jnp.float32, param_dtype=jnp.float32)
        return exact.apply({"params": params}, latents, time, caption, MASK, guidance)

    arrays = normal(2, 3, 4, 4), np.array([0.3, 0.9], np.float32)
    check(monkeypatch, fn, arrays, (normal(2, 3, 4, 4), normal(2)), 1e-5)
