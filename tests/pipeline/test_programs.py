"""The jitted functions: noise, and the way from [-1, 1] to pixels of the asked size."""

import jax
import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor

from sana_jax.pipeline import programs


def test_noise_does_not_depend_on_the_environment():
    """TPU users set the rbg generator, whose numbers depend on the batch."""
    keys = np.arange(6, dtype=np.uint32).reshape(3, 2)
    expected = np.asarray(programs.draw_noise(keys, (4, 4, 8)))
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False), jax.enable_x64(True):
        found = np.asarray(programs.draw_noise(keys, (4, 4, 8)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(programs.draw_noise(keys[2:], (4, 4, 8))[0], expected[2])


def test_noise_is_that_of_the_seed_as_a_key():
    """With 64 bits, JAX makes a key of them; without, seeds of one word give the same."""
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1]
    keys = np.array([divmod(seed, 2**32) for seed in seeds], np.uint32)
    found = np.asarray(programs.draw_noise(keys, (2, 2, 8)))
    with jax.enable_x64(True), jax.threefry_partitionable(True):
        for seed, noise in zip(seeds, found, strict=True):
            key = jax.random.key(np.uint64(seed), impl="threefry2x32")
            expected = jax.random.normal(key, (2, 2, 8), jax.numpy.float32)
            np.testing.assert_array_equal(noise, expected)


def test_values_become_bytes_and_those_that_are_not_finite_are_told():
    images = np.zeros((3, 1, 2, 3), np.float32)
    images[0, 0] = [[-1, 0, 1], [-7, 0.5, 7]]
    images[1, 0, 1, 2], images[2, 0, 0, 0] = np.nan, np.inf
    found, finite = programs.to_uint8(images)
    assert found.dtype == np.uint8 and finite.tolist() == [True, False, False]
    assert found[0, 0].tolist() == [[0, 128, 255], [0, 191, 255]]
    assert programs.to_unit_range(images)[0, 0].tolist() == [[0, 0.5, 1], [0, 0.75, 1]]


@pytest.mark.parametrize("size", [(40, 20), (16, 24), (32, 48), (30, 36)])
def test_resized_and_cropped_as_diffusers_does(size):
    images = np.random.default_rng(0).standard_normal((2, 32, 48, 3), np.float32)
    found = programs.resize_and_crop(images, size)
    theirs = torch.tensor(images).permute(0, 3, 1, 2)
    theirs = PixArtImageProcessor.resize_and_crop_tensor(theirs, size[1], size[0])
    assert found.shape == (2, *size, 3)
    np.testing.assert_allclose(found, theirs.permute(0, 2, 3, 1), atol=1e-5)
