"""Optimizers and schedules against formulas in NumPy; frozen parameters stand still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax.runtime.errors import UserError
from sana_jax.training.optimizers import optimizers
from sana_jax.training.optimizers.masks import EVERYTHING
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_optimizer, make_schedule


def params():
    values = iter(np.random.default_rng(0).normal(size=(9, 2, 3)).astype("float32"))
    tree = {
        "encoder": {"in": {"kernel": next(values), "bias": next(values)}, "norm": {}},
        "decoder": {"head": {"kernel": next(values), "depthwise_kernel": next(values)}},
    }
    tree["encoder"]["norm"]["scale"] = next(values)
    tree["decoder"]["modulation_table"] = next(values)
    tree["decoder"]["head"]["kernel"][0] = -0.0
    return jax.tree.map(jnp.asarray, tree)


def run(config, trainable=EVERYTHING, count=5, steps=10):
    tx, schedule = make_optimizer(config, params(), steps, trainable)
    current, s = params(), tx.init(params())
    random = np.random.default_rng(1)
    for _ in range(count):
        grads = jax.tree.map(lambda p: jnp.float32(random.normal(size=p.shape)), current)
        updates, s = jax.jit(tx.update)(grads, s, current)
        current = optax.apply_updates(current, updates)
    return current, s


def test_adamw_is_that_of_the_formula():
    """AdamW of Loshchilov and Hutter (2019), with clipping; only kernels are decayed."""
    config = OptimizerConfig(
        learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=2.0,
        warmup_steps=3, schedule="cosine", final_fraction=0.1,
    )  # fmt: skip
    found, _ = run(config)
    leaves = {
        jax.tree_util.keystr(p): np.float64(v)
        for p, v in jax.tree_util.tree_leaves_with_path(params())
    }
    m, v = dict.fromkeys(leaves, 0.0), dict.fromkeys(leaves, 0.0)
    random = np.random.default_rng(1)
    for k in range(5):
        grads = {
            name: np.float64(np.float32(random.normal(size=p.shape))) for name, p in leaves.items()
        }
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = (
            0.1 * (k + 1) / 3
            if k < 3
            else 0.1 * (0.9 * (1 + np.cos(np.pi * (k - 3) / 7)) / 2 + 0.1)
        )
        for name, g in grads.items():
            g = g * min(1, 2 / norm)
            m[name], v[name] = 0.8 * m[name] + 0.2 * g, 0.9 * v[name] + 0.1 * g**2
            step = m[name] / (1 - 0.8 ** (k + 1)) / (np.sqrt(v[name] / (1 - 0.9 ** (k + 1))) + 1e-6)
            decay = 0.3 if "kernel" in name else 0
            leaves[name] = leaves[name] - rate * (step + decay * leaves[name])
    for path, value in jax.tree_util.tree_leaves_with_path(found):
        np.testing.assert_allclose(value, leaves[jax.tree_util.keystr(path)], rtol=2e-5, atol=1e-6)


def test_frozen_stands_still_and_costs_nothing():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip_norm=1.0)
    found, s = run(config, ["encoder/in/.*"])
    before = params()
    assert (found["encoder"]["in"]["bias"] != before["encoder"]["in"]["bias"]).all()
    del found["encoder"]["in"], before["encoder"]["in"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert sum(leaf.size for leaf in jax.tree.leaves(s) if leaf.ndim) == 2 * 12


def test_frozen_does_not_count_in_the_clipped_norm():
    config = OptimizerConfig(learning_rate=0.1, clip_norm=0.5)
    tree = {"a": jnp.ones(4), "b": jnp.ones(4)}
    tx, _ = make_optimizer(config, tree, 10, ["a"])
    _, s = tx.update({"a": jnp.full(4, 0.2), "b": jnp.full(4, 1e6)}, tx.init(tree), tree)
    moments = [leaf for leaf in jax.tree.leaves(s) if leaf.ndim]
    np.testing.assert_allclose(moments[0], 0.1 * 0.2, rtol=1e-6)


def test_schedules():
    def rates(**kw):
        return [
            float(make_schedule(OptimizerConfig(learning_rate=2.0, **kw), 8)(k)) for k in range(9)
        ]

    assert rates() == [2.0] * 9
    assert rates(warmup_steps=4) == [0.5, 1, 1.5, 2] + [2] * 5
    assert rates(warmup_steps=1)[:2] == [2, 2]
    assert rates(schedule="linear", warmup_steps=4) == [0.5, 1, 1.5, 2, 2, 1.5, 1, 0.5, 0]
    cosine = rates(schedule="cosine", final_fraction=0.5)
    np.testing.assert_allclose(cosine, 1.5 + 0.5 * np.cos(np.pi * np.arange(9) / 8), rtol=1e-6)
    assert optimizers.sqrt_scaled(1e-3, 1024, 256) == 2e-3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(name="adam"), "name 'adam' is unknown; there are adamw, adafactor, muon, came"),
        (dict(schedule="cosin"), "schedule 'cosin' is unknown; there are constant, cosine"),
        (dict(learning_rate=-1.0), "learning_rate=-1.0: give a positive number"),
        (dict(learning_rate=float("nan")), "learning_rate=nan"),
        (dict(clip_norm=0.0), "clip_norm=0.0"),
        (dict(state_bits=8), "state_bits=8: give 32, or 8 with the optimizer came"),
        (dict(name="came", state_bits=4), "state_bits=4: give 32"),
        (dict(warmup_steps=11), "warmup_steps=11: give 0 to steps=10"),
        (dict(trainable=["decoder/hed/.*"]), "'decoder/hed/.*' matches no parameter; paths are as"),
        (dict(trainable=["("]), "trainable pattern '.': "),
    ],
)
def test_bad_figures(change, message):
    trainable = change.pop("trainable", EVERYTHING)
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimizerConfig(**change), params(), 10, trainable)
