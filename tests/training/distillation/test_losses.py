"""The fakes of the distillation's discriminator."""

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training.distillation import losses


def test_misaligned_latents_stand_at_the_next_sample_s_caption():
    latents = np.arange(3 * 4, dtype=np.float32).reshape(3, 2, 2, 1)
    np.testing.assert_array_equal(losses.misaligned(latents), latents[[2, 0, 1]])


def test_each_kind_of_fakes_has_half_of_their_weight():
    real, drawn, misaligned = np.float32([[2, 0]]), np.float32([[-3, 1]]), np.float32([[0, 0.5]])
    found = losses.discriminator_loss(real, jnp.concatenate([drawn, misaligned]))
    of_fakes = (np.mean([0, 2]) + np.mean([1, 1.5])) / 2
    assert found == pytest.approx((np.mean([0, 1]) + of_fakes) / 2)
    assert losses.generator_loss(drawn) == pytest.approx(1)
