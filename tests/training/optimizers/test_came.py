"""CAME against its algorithm in float64; the 8-bit state against rounding in NumPy; its size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax.models.dit import PRESETS, SanaTransformer
from sana_jax.training.optimizers import came
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_optimizer

SHAPES = {
    "kernel": (6, 4),
    "table": (2, 5),
    "conv1x1": (1, 1, 4, 3),
    "conv3x3": (3, 3, 2, 3),
    "depthwise": (3, 3, 5),
    "bias": (4,),
}
MATRICES = ("kernel", "table", "conv1x1")


def gradients(steps, shapes=SHAPES):
    """Gradients of sizes that the clip and both eps act on; one kernel output has none."""
    random = np.random.default_rng(0)
    for k in range(steps):
        grads = {
            name: np.float32(random.normal(size=shape) * 10.0 ** random.integers(-6, 3))
            for name, shape in shapes.items()
        }
        if k == 5:
            grads["bias"][:] = 0
        if "kernel" in grads:
            grads["kernel"][:, 1] = 0
        yield grads


def reference(grads, matrix, b1, b2, b3, eps1, eps2, clip):
    """Returns one parameter's directions, with the statistics as whole matrices, in float64."""

    def rank_one(x):
        rows, columns = x.mean(axis=1, keepdims=True), x.mean(axis=0, keepdims=True)
        return rows * columns / x.mean()

    shape, v, s, m = grads[0].shape, 0.0, 0.0, 0.0
    for g in grads:
        g = np.float64(g).reshape(shape[-2:] if matrix else shape)
        v = b2 * v + (1 - b2) * (g**2 + eps1)  # the mean of a mean is the mean of all that was
        u = g / np.sqrt(rank_one(v) if matrix else v)
        u = u / max(1, np.sqrt((u**2).mean()) / clip)
        m = b1 * m + (1 - b1) * u
        s = b3 * s + (1 - b3) * ((u - m) ** 2 + eps2)
        yield (m / np.sqrt(rank_one(s)) if matrix else m).reshape(shape)


@pytest.mark.parametrize("figures", [{}, dict(b1=0.7, b2=0.9, b3=0.95, eps=(1e-5, 1e-3), clip=0.5)])
def test_directions_are_those_of_the_algorithm(figures):
    settings = dict(b1=0.9, b2=0.999, b3=0.9999, eps=(1e-30, 1e-16), clip=1.0) | figures
    eps1, eps2 = settings.pop("eps")
    every = list(gradients(12))
    wanted = {
        name: list(
            reference([g[name] for g in every], name in MATRICES, eps1=eps1, eps2=eps2, **settings)
        )
        for name in SHAPES
    }
    tx = came.came(**figures)
    state, update = tx.init(every[0]), jax.jit(tx.update)
    for k, grads in enumerate(every):
        found, state = update(grads, state)
        for name in SHAPES:
            np.testing.assert_allclose(found[name], wanted[name][k], rtol=2e-5, atol=1e-7)


def test_which_moments_are_factored():
    state = came.came().init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    assert {n for n, x in state.items() if isinstance(x.square, came.Factored)} == set(MATRICES)
    assert {n for n, x in state.items() if x.instability} == set(MATRICES)
    assert state["kernel"].square.rows.shape == (6,)
    assert state["kernel"].square.columns.shape == (4,)


@pytest.mark.parametrize("width, size", [(2240, 224), (1152, 192), (32, 32), (512, 256), (257, 1)])
def test_block_size(width, size):
    assert came.block_size(width) == size


def test_quantised_is_the_nearest_step():
    x = np.random.default_rng(0).normal(size=(5, 512)).astype("float32")
    x[0] = 0
    found = came.quantise(x)
    blocks = np.float64(x).reshape(5, 2, 256)
    scale = abs(blocks).max(-1) / 127
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    assert found.codes.dtype == jnp.int8 and found.codes.shape == x.shape
    error = abs(np.asarray(came.dequantise(found)) - x).reshape(blocks.shape)
    assert (error <= 0.5001 * scale[..., None]).all() and error.max() > 0.4 * scale.max()
    np.testing.assert_array_equal(came.dequantise(found)[0], 0)


def test_8_bits_follow_32():
    """The first direction is the same; later ones differ by the rounding of the kept state."""
    shapes = {"kernel": (130, 160), "narrow": (1400, 13), "bias": (160,)}
    whole, small = came.came(), came.came(state_bits=8)
    a, b = (tx.init({n: jnp.zeros(s) for n, s in shapes.items()}) for tx in (whole, small))
    assert isinstance(b["kernel"].momentum, came.Quantised)
    assert not any(isinstance(b[n].momentum, came.Quantised) for n in ("narrow", "bias"))
    update_a, update_b = jax.jit(whole.update), jax.jit(small.update)
    random = np.random.default_rng(0)
    errors = []
    for _ in range(12):
        g = {n: np.float32(random.normal(size=s) + 0.3) for n, s in shapes.items()}
        (want, a), (found, b) = update_a(g, a), update_b(g, b)
        for name in "narrow", "bias":
            np.testing.assert_array_equal(found[name], want[name])
        difference = np.linalg.norm(found["kernel"] - want["kernel"])
        errors.append(difference / np.linalg.norm(want["kernel"]))
    print("relative errors of the 8-bit direction:", *(f"{e:.1e}" for e in errors))
    assert errors[0] < 1e-6 and 1e-4 < max(errors) < 0.02  # a step is 1 / 127 of the largest


def test_bytes_of_state():
    """Bytes for each number of the 1.6B transformer: Adam 8, CAME 4 and a little, in 8 bits 1."""
    config = PRESETS["sana_1600m_1024"]
    args = jnp.zeros((1, 2, 2, 32)), jnp.zeros(1), jnp.zeros((1, 3, 2304)), jnp.ones((1, 3), bool)
    params = jax.eval_shape(SanaTransformer(config).init, jax.random.key(0), *args)["params"]

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def by_number(**change):
        tx, _ = make_optimizer(OptimizerConfig(**change), params, 10)
        return 4 * size(jax.eval_shape(tx.init, params)) / size(params)

    found = [by_number(**c) for c in ({}, dict(name="came"), dict(name="came", state_bits=8))]
    print("bytes of state a parameter, AdamW, CAME, CAME 8 bits:", found)
    np.testing.assert_allclose(found, [8, 4.01, 1.05], atol=0.02)


def test_it_descends():
    """CAME in 8 bits on a badly scaled quadratic."""
    tx = came.came(state_bits=8)
    scale = jnp.logspace(-2, 1, 160)
    goal = jax.random.normal(jax.random.key(0), (130, 160))

    def loss(w):
        return jnp.mean(scale * (w - goal) ** 2)

    @jax.jit
    def step(w, state):
        direction, state = tx.update(jax.grad(loss)(w), state)
        return optax.apply_updates(w, -1e-3 * direction), state

    w, state = jnp.zeros_like(goal), tx.init(goal)
    for _ in range(200):
        w, state = step(w, state)
    assert loss(w) < 0.05 * loss(jnp.zeros_like(goal))
