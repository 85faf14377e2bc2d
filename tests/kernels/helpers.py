"""What the tests of kernels share: checks against formulas in float64, and the real compilers.

TPU kernels run in Pallas' TPU interpreter and compile for chips that are not here; GPU kernels run
in the plain interpreter and are lowered for CUDA.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels.cross_attention import cross_attention
from sana_jax.kernels.glumbconv import api as glumbconv
from sana_jax.kernels.linear_attention import linear_attention
from sana_jax.kernels.modulated_norm import modulated_norm
from sana_jax.kernels.multiscale_attention import multiscale_attention
from sana_jax.kernels.res_block import res_block
from sana_jax.kernels.scaled_product import scaled_product
from sana_jax.sharding import MESH_AXES

CHIPS = "v5e", "v5p", "v6e"
TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3}  # bfloat16 keeps eight bits: 4e-3 a rounding
rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float64):
    return rng.standard_normal(shape, dtype)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(run, formula, arrays, dtype):
    """`run(arrays, cotangent)` -> (out or several of them, gradients), against `formula`."""
    arrays = [jnp.asarray(array, dtype) for array in arrays]
    exact = [np.asarray(array, np.float64) for array in arrays]
    with jax.enable_x64(True):
        cotangent = jnp.asarray(normal(*jax.eval_shape(formula, *exact).shape), dtype)
        formula = jax.jit(partial(run_public, formula))  # one program, where each operation was one
        out, gradients = formula(exact, np.asarray(cotangent, np.float64))
        expected = [np.asarray(x) for x in (out, *gradients)]
    found_out, found_gradients = jax.jit(run)(arrays, cotangent)
    outs = jax.tree.leaves(found_out)
    expected = [expected[0]] * len(outs) + expected[1:]
    for found, exact in zip((*outs, *found_gradients), expected, strict=True):
        error = relative_error(found.reshape(exact.shape), exact)
        assert error < TOLERANCE[dtype], error


def run_public(fn, arrays, cotangent):
    """A public function, differentiated as a network does it."""
    out, pull_back = jax.vjp(fn, *arrays)
    return out, pull_back(cotangent)


def kernel_of(platform):
    """In place of dispatch.by_platform: the kernel of a platform, or the plain form without one."""
    return lambda *args, plain, **kernels: kernels.get(platform, plain)(*args)


def projected(split_rows, value, gate, *arrays):
    """glumbconv by its kernel, of one argument an array."""
    *weights, projection, scale = arrays
    images, weights = (value, gate), tuple(weights)
    return glumbconv.projected_glumbconv(split_rows, images, weights, projection, scale)


def spec(*shape, dtype="bfloat16", sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def loss(fn):
    """The cotangent of the first operand, where the result's squares are the loss."""

    def squares(*args):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(fn(*args)))

    return jax.grad(squares, argnums=0)


def operations(
    sharding=None, side=8, width=224, hidden=160, heads=2, rows=20, dtype="bfloat16", batch=1
):
    """Forward and backward of every operation, through its public function: (loss, operands)."""
    made = partial(spec, sharding=sharding, dtype=dtype)
    attention = partial(linear_attention, head_dim=32, implementation="pallas")
    to_text = partial(cross_attention, heads=heads, implementation="pallas")
    norm = partial(modulated_norm, implementation="pallas")
    tokens = side * side
    x, vector = made(batch, tokens, width), made(batch, 1, width)
    image, wide = made(batch, side, side, hidden), made(2 * hidden)
    after = made(hidden, width), made(batch, 1, 1, width)
    mask = made(batch, rows, dtype="bool")
    square, channels = made(3, 3, 128, 128), made(128)
    return {
        "linear_attention": (loss(attention), (made(batch, tokens, 3 * width),)),
        "glumbconv": (
            loss(partial(projected, True)),
            (image, image, wide, made(3, 3, 2 * hidden), wide, *after),
        ),
        "cross_attention": (loss(to_text), (x, made(batch, rows, 2 * width), mask)),
        "modulated_norm": (loss(norm), (x, vector, vector)),
        "scaled_product": (
            loss(lambda kernel, x, scale: scaled_product(x, kernel, scale)),
            (made(hidden, width), made(batch, tokens, hidden), vector),
        ),
        "res_block": (
            res_block,
            (made(batch, 16, 16, 128), square, channels, square, channels, channels),
        ),
        "multiscale_attention": (
            partial(multiscale_attention, head_dim=32, implementation="pallas"),
            (made(batch, 16, 16, 384), ((made(5, 5, 384), made(12, 32, 32)),)),
        ),
    }


def tpu_mesh(chip):
    pytest.importorskip("libtpu")
    from sana_jax.measure import tpu_estimate

    axes = dict.fromkeys(MESH_AXES, 1)
    return tpu_estimate.tpu_mesh("2x2x1" if chip == "v5p" else "2x2", axes, chip)


def compile_for_tpu(name, chip, **sizes):
    mesh = tpu_mesh(chip)
    from sana_jax.measure import tpu_estimate

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fn, args = operations(sharding, **sizes)[name]
    with jax.set_mesh(mesh):
        estimate = tpu_estimate.estimate(fn, *args, chip=chip)
    assert any(name in kernel for kernel in estimate.kernels)
    assert estimate.kernel_cycles > 0
