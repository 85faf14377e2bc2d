"""Parameters are found by name, boxed with their axes or not."""

import jax
from flax import linen as nn

from sana_jax.training.optimizers import masks
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_optimizer
from tests.training.optimizers.test_optimizers import params


def test_stop_frozen():
    mask = {"a": True, "b": False}
    grads = jax.grad(lambda p: sum(jax.tree.leaves(masks.stop_frozen(p, mask))))(
        {"a": 1.0, "b": 2.0}
    )
    assert grads == {"a": 1.0, "b": 0.0}


def test_boxed_parameters_have_the_same_masks():
    boxed = jax.tree.map(lambda p: nn.LogicallyPartitioned(p, ("embed", None)), params())
    assert masks.decay_mask(boxed) == masks.decay_mask(params())
    patterns = [r".*/norm/\w+", "decoder/head/kernel"]
    mask = masks.trainable_mask(boxed, patterns)
    assert mask == masks.trainable_mask(params(), patterns)
    assert sum(jax.tree.leaves(mask)) == 2
    tx, _ = make_optimizer(OptimizerConfig(weight_decay=0.1), boxed, 10, patterns)
    plain, _ = make_optimizer(OptimizerConfig(weight_decay=0.1), params(), 10, patterns)
    a, b = nn.unbox(tx.init(boxed)), plain.init(params())
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_matrices_decay_those_of_a_lora_too():
    site = {"a": 1.0, "b": 1.0}
    tree = {"q": site, "ffn": {"depthwise_kernel": 1.0, "bias": 1.0}, "out": {"kernel": 1.0}}
    assert masks.decay_mask(tree) == {
        "q": {"a": True, "b": True},
        "ffn": {"depthwise_kernel": True, "bias": False},
        "out": {"kernel": True},
    }
