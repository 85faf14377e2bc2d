"""The losses against their formulas in NumPy's float64, and the adaptive weight in use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training.autoencoder import losses


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_l1_is_a_mean_over_all_values():
    x, y = normal(2, 4, 5, 3), normal(2, 4, 5, 3, seed=1)
    np.testing.assert_allclose(losses.l1(x, y), np.abs(x - y, dtype=np.float64).mean(), rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
    x = jnp.full((4, 64, 64, 3), 1 / 3, jnp.bfloat16)
    assert losses.l1(x, jnp.zeros(x.shape)).dtype == jnp.float32
    np.testing.assert_allclose(losses.l1(x, jnp.zeros(x.shape)), float(x[0, 0, 0, 0]), rtol=1e-6)


def test_hinge():
    real, fake = np.float32([2, 0.5, -1]), np.float32([-3, 0, 1.5])
    # max(0, 1 - real) = 0, 0.5, 2; max(0, 1 + fake) = 0, 1, 2.5
    assert losses.discriminator_loss(real, fake) == pytest.approx((2.5 / 3 + 3.5 / 3) / 2)
    assert losses.generator_loss(fake) == pytest.approx(0.5)


def test_a_discriminator_past_its_margin_stops_learning():
    gradient = jax.grad(losses.discriminator_loss, argnums=(0, 1))
    assert [float(g[0]) for g in gradient(jnp.ones(1) * 1.1, -jnp.ones(1) * 1.1)] == [0, 0]
    assert [float(g[0]) for g in gradient(jnp.zeros(1), jnp.zeros(1))] == [-0.5, 0.5]


def test_adaptive_weight_is_the_ratio_of_the_norms_over_the_whole_tree():
    rec = {"kernel": normal(3, 3, 4, 3), "bias": normal(3, seed=1)}
    gen = {"kernel": 0.1 * normal(3, 3, 4, 3, seed=2), "bias": 0.1 * normal(3, seed=3)}

    def norm(tree):
        return np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in tree.values()))

    expected = norm(rec) / (norm(gen) + 1e-4)
    np.testing.assert_allclose(losses.adaptive_weight(rec, gen), expected, rtol=1e-6)
    assert losses.adaptive_weight(rec, gen, maximum=2.0) == 2.0
    nothing = jax.tree.map(jnp.zeros_like, gen)
    assert losses.adaptive_weight(rec, nothing) == 1e4


def test_adaptive_weight_is_a_constant_to_gradients():
    assert jax.grad(lambda g: losses.adaptive_weight(g, jnp.ones(3)))(jnp.ones(3)).sum() == 0


def test_the_cheap_way_gives_the_gradient_of_the_weighted_sum():
    """Pixels' gradients, pulled back once for the weight and once for the sum, as documented."""
    head, features, images = normal(4, 3), normal(2, 8, 8, 4, seed=1), normal(2, 8, 8, 3, seed=2)

    def draw(head, features):
        return features @ head

    def adversarial(pixels):
        return losses.generator_loss(jnp.sin(pixels))

    pixels, pull = jax.vjp(lambda head: draw(head, features), head)
    to_rec, to_gen = (
        jax.grad(losses.l1)(pixels, images),
        jax.grad(adversarial)(pixels),
    )
    (rec,), (gen,) = pull(to_rec), pull(to_gen)
    weight = losses.adaptive_weight(rec, gen)
    assert 0 < weight < 1e4

    def whole(head, features):
        drawn = draw(head, features)
        return losses.l1(drawn, images) + weight * adversarial(drawn)

    to_head, to_features = jax.grad(whole, argnums=(0, 1))(head, features)
    np.testing.assert_allclose(rec + weight * gen, to_head, rtol=2e-5, atol=1e-6)
    _, pull_rest = jax.vjp(lambda features: draw(head, features), features)
    np.testing.assert_allclose(pull_rest(to_rec + weight * to_gen)[0], to_features, atol=1e-6)
