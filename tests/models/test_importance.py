"""The importance of blocks, by the formula and a block at a time."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from sana_jax.models.dit import Block, SanaConfig, SanaTransformer
from sana_jax.models.importance import MeasuredTransformer, turn
from tests import toy

TINY = SanaConfig(
    depth=3, width=32, latent_channels=4, cross_heads=2, caption_channels=16, sample_size=4
)


def inputs(batch=2):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, 4, 6, 4), np.float32)
    caption = rng.standard_normal((batch, 5, 16), np.float32)
    return latents, jnp.array([500.0]), caption, np.arange(5)[None] < np.array([[5], [2]])


@pytest.fixture(scope="module")
def params():
    params = jax.jit(SanaTransformer(TINY).init)(jax.random.key(0), *inputs())["params"]
    # Larger than the first weights are, so that every block turns its input.
    return jax.tree.map(lambda x: 2 * x, nn.unbox(params))


def measured(params, **options):
    latents, timestep, caption, mask = inputs()
    module = MeasuredTransformer(TINY, **options)
    apply = partial(module.apply, {"params": params})
    keys_values = apply(caption, method="keys_values")
    return jax.jit(partial(apply, method="importance"))(latents, timestep, keys_values, mask)


class Watched(Block):
    """A block that keeps what goes in and out, where nothing is traced."""

    seen = []

    def with_keys_values(self, x, keys_values, modulation, mask):
        after, _ = super().with_keys_values(x, keys_values, modulation, mask)
        jax.debug.callback(lambda *pair: self.seen.append(pair), x, after, ordered=True)
        return after, None


def test_importance_is_one_minus_the_cosine_of_each_token_before_and_after(params, monkeypatch):
    found = np.asarray(measured(params))
    monkeypatch.setattr("sana_jax.models.dit.Block", Watched)
    latents, timestep, caption, mask = inputs()
    apply = partial(SanaTransformer(TINY).apply, {"params": params})
    keys_values = apply(caption, method="keys_values")
    Watched.seen.clear()
    jax.block_until_ready(apply(latents, timestep, keys_values, mask, method="denoise"))
    jax.effects_barrier()
    assert len(Watched.seen) == TINY.depth
    for block, (x, y) in enumerate(Watched.seen):
        x, y = (np.asarray(side, np.float64) for side in (x, y))
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        np.testing.assert_allclose(found[block], 1 - cosine.mean(axis=(1, 2)), rtol=1e-4)
    assert (found > 1e-3).all()


def test_a_block_that_returns_its_input_has_no_importance(params):
    flat = traverse_util.flatten_dict(params["blocks"], sep="/")
    for path in "attention/out", "cross_attention/out", "ffn/contract":
        for name in (name for name in flat if name.startswith(path)):
            flat[name] = flat[name].at[1].set(0)
    silent = traverse_util.unflatten_dict(flat, sep="/")
    found = np.asarray(measured({**params, "blocks": silent}))
    assert (found[1] == 0).all() and (found[[0, 2]] > 1e-3).all()


def test_it_is_measured_in_float32_also_in_a_bfloat16_network(params):
    found = measured(params, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    toy.assert_close(found, measured(params), 0.05, "bfloat16")


def test_a_small_angle_keeps_its_digits():
    angle = np.float32(1e-4)  # 1 - cos is 5e-9, below the spacing of float32 at 1
    x, y = np.float32([[3, 0]]), 2 * np.array([[np.cos(angle), np.sin(angle)]], np.float32)
    np.testing.assert_allclose(turn(x, y), angle**2 / 2, rtol=1e-3)
    np.testing.assert_allclose(turn(x, -y), 2, rtol=1e-6)
    assert turn(x, x) == 0


def test_large_numbers_do_not_overflow_and_what_is_not_finite_shows():
    x, y = np.float32([[3e30, 0]]), np.float32([[0, 2e-30]])
    np.testing.assert_allclose(turn(x, y), 1, rtol=1e-6)
    np.testing.assert_allclose(turn(x, -x), 2, rtol=1e-6)
    assert np.isnan(turn(np.float32([[np.inf, 1]]), y)).all()
    assert turn(0 * x, 0 * x) == 0


def test_the_network_needs_no_more_parameters_than_before(params):
    shapes = jax.eval_shape(MeasuredTransformer(TINY).init, jax.random.key(0), *inputs())["params"]
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)) == jax.tree.map(jnp.shape, params)
    assert dataclasses.asdict(MeasuredTransformer(TINY).config) == dataclasses.asdict(TINY)
