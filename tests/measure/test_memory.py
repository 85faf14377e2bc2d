"""The compiler's account: weights to the byte."""

import math

import jax

from sana_jax.checkpoints.components import param_shapes
from sana_jax.measure import inputs, memory
from sana_jax.measure.inputs import Settings


def test_the_account_adds_up():
    settings = Settings("tiny", "memory", 1, 64, "bfloat16", 2)
    found, checkpoint = memory.analyse(settings), inputs.checkpoint(settings)
    for name, config in checkpoint.configs().items():
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config))]
        assert found["weights"][name] == 2 * sum(sizes)
    weights, working = found["weights"], found["working"]
    assert all(size > 0 for size in working.values())
    assert found["peak"] == sum(weights.values()) + max(working.values())
    without = weights["dit"] + weights["vae"] + max(working["loop"], working["decode"])
    assert found["peak_without_text_encoder"] == without < found["peak"]
    assert working["decode"] > 4 * 64 * 64 * 3  # the picture, in float32
