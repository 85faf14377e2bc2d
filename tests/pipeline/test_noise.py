"""The noise of a request: of each image's own seed, and of as many steps as are run."""

import numpy as np
import pytest

from sana_jax.pipeline.noise import noise_of
from sana_jax.pipeline.programs import draw_noise
from sana_jax.pipeline.request import Request
from tests.pipeline.test_steps import PICTURE, SANA, SPRINT

SHAPE = (32, 32, 8)


def test_sana_starts_from_its_seed_and_adds_nothing():
    request = Request.of(SANA, ["a", "b"], seed=7)
    noise, fresh = noise_of(request, SHAPE)
    assert fresh is None
    np.testing.assert_array_equal(noise, draw_noise(request.keys, SHAPE))
    given = np.ones((2, *SHAPE), np.float32)
    noise, fresh = noise_of(Request.of(SANA, ["a", "b"], latents=given), SHAPE)
    assert fresh is None and (noise == given).all()


def test_every_step_of_sprint_has_noise_of_the_image_s_own_seed():
    noise, fresh = noise_of(Request.of(SPRINT, ["a", "b", "c"], seed=7, num_steps=4), SHAPE)
    assert fresh.shape == (3, 4, *SHAPE)
    np.testing.assert_array_equal(
        noise, noise_of(Request.of(SANA, ["a", "b", "c"], seed=7), SHAPE)[0]
    )
    every = np.concatenate([np.asarray(noise)[:, None], fresh[:, :3]], axis=1).reshape(12, -1)
    assert np.abs(np.corrcoef(every) - np.eye(12)).max() < 0.05  # no noise is another's
    np.testing.assert_allclose(every.std(axis=1), 1, atol=0.05)
    alone, added = noise_of(Request.of(SPRINT, "b", seed=8, num_steps=4), SHAPE)
    np.testing.assert_array_equal(alone, noise[1:2])
    np.testing.assert_array_equal(added[:, :3], fresh[1:2, :3])  # the last is not used


def test_noise_may_be_handed_in_for_the_start_or_for_every_step():
    seeded, added = noise_of(Request.of(SPRINT, "a", seed=3), SHAPE)
    start = np.ones((1, *SHAPE), np.float32)
    noise, fresh = noise_of(Request.of(SPRINT, "a", seed=3, latents=start), SHAPE)
    assert (noise == start).all() and (np.asarray(seeded) != start).any()
    np.testing.assert_array_equal(fresh[:, 0], added[:, 0])
    every = np.random.default_rng(0).standard_normal((1, 2, *SHAPE), np.float32)
    noise, fresh = noise_of(Request.of(SPRINT, "a", latents=every), SHAPE)
    np.testing.assert_array_equal(noise, every[:, 0])
    np.testing.assert_array_equal(fresh[:, 0], every[:, 1])


@pytest.mark.parametrize("strength, steps", [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_picture_needs_the_noise_of_the_steps_that_are_run(strength, steps):
    request = Request.of(SPRINT, "a", image=PICTURE, num_steps=4, strength=strength)
    assert noise_of(request, (2, 2, 8))[1].shape == (1, steps, 2, 2, 8)
