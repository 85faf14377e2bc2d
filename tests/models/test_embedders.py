"""Embeddings; test_dit.py compares the velocities that they lead to with diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.models.embedders import (
    CaptionEmbedder,
    TimestepEmbedder,
    position_features,
    timestep_features,
)


def test_timestep_features_are_rounded_once():
    """In float32 an angle of 999 would be off by 3e-5; its features here are not."""
    found = np.asarray(timestep_features(jnp.array([999.0])))[0]
    angles = 999.0 * (10000.0 ** -(np.arange(128) / 128)).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(found, np.r_[np.cos(angles), np.sin(angles)], atol=1e-4)


def test_a_larger_picture_has_the_same_positions_denser():
    small, large = (position_features(n, 8, 1.0, 16) for n in (8, 16))
    np.testing.assert_array_equal(large[::2], small)


def test_the_scale_of_positions_divides_their_coordinates():
    np.testing.assert_allclose(
        position_features(8, 16, 2.0, 16), position_features(8, 8, 1.0, 16), atol=1e-6
    )


def test_timesteps_stay_float32_beside_narrow_weights():
    module = TimestepEmbedder(8, param_dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), jnp.zeros(2))
    embedding, modulation = module.apply(params, jnp.array([1.0, 1.5]))
    assert embedding.dtype == modulation.dtype == jnp.float32
    assert embedding.shape == (2, 8) and modulation.shape == (2, 6, 8)


def test_captions_are_normed():
    """However large the text encoder's states are; 0.01 is the norm's first scale."""
    module, rows = CaptionEmbedder(16), 100 * jax.random.normal(jax.random.key(0), (2, 3, 12))
    found = module.apply(module.init(jax.random.key(1), rows), rows)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(found**2, axis=-1)), 0.01, rtol=1e-3)
