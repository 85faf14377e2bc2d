"""The tokens after chosen blocks, against a network that ends there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.models.dit import Block
from sana_jax.models.features import FeatureTransformer
from tests.models.test_importance import TINY, inputs, params  # noqa: F401
from tests.toy import assert_close


def features(module, weights, blocks, latents=None):
    own, *others = inputs()
    apply = partial(module.apply, {"params": weights}, method="features")
    return apply(own if latents is None else latents, *others, blocks)


def expected(weights, latents, blocks):
    """A block at a time, from the network's own parts."""

    def tokens(module, latents, timestep, caption, mask):
        found = []

        def run(x, modulation):
            caption_rows = module.caption_embed(caption)
            for i in range(TINY.depth):
                row = jax.tree.map(lambda leaf: leaf[i], weights["blocks"])  # noqa: B023
                x, _ = Block(TINY, parent=None).apply(
                    {"params": row}, x, modulation, caption_rows, mask
                )
                found.append(x)
            return x, None

        module._predict(latents, timestep, None, run)
        return [found[i].reshape(len(latents), -1, TINY.width) for i in blocks]

    _, *others = inputs()
    return FeatureTransformer(TINY).apply({"params": weights}, latents, *others, method=tokens)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_features_are_the_tokens_after_their_blocks(params, remat):  # noqa: F811
    latents, blocks = jnp.asarray(inputs()[0]), (0, 2)

    def loss(function, latents):
        found = function(latents)
        return sum(jnp.sin(i + x).sum() for i, x in enumerate(found)), found

    def both(function):
        return jax.jit(jax.value_and_grad(partial(loss, function), has_aux=True))(latents)

    module = FeatureTransformer(TINY, remat=remat)
    (_, found), gradient = both(lambda x: features(module, params, blocks, x))
    (_, tokens), by_hand = both(lambda x: expected(params, x, blocks))
    assert len(found) == 2
    for mine, theirs in zip(found, tokens, strict=True):
        assert mine.shape == (2, 24, 32)
        assert_close(mine, theirs, 1e-6, "tokens")
    assert_close(gradient, by_hand, 1e-5, "gradient")


def test_no_block_after_the_last_one_runs(params):  # noqa: F811
    poisoned = dict(params, blocks=jax.tree.map(lambda x: x.at[2].set(np.nan), params["blocks"]))

    @partial(jax.jit, static_argnums=0)
    def last(blocks):
        return features(FeatureTransformer(TINY), poisoned, blocks)[-1]

    assert np.isfinite(last((0, 1))).all() and not np.isfinite(last((0, 2))).any()


@pytest.mark.parametrize("blocks", [(), (1, 1), (2, 1), (0, 3), (-1, 1)])
def test_refuses_blocks_that_are_not_there(params, blocks):  # noqa: F811
    with pytest.raises(ValueError, match=r"rising numbers of 0 \.\. 2"):
        features(FeatureTransformer(TINY), params, blocks)
