"""A stack of layers is updated as its layers are; the state is sharded as the parameters are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from sana_jax import sharding
from sana_jax.training import state as train_state
from sana_jax.training.optimizers.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer
from sana_jax.training.optimizers.per_layer import layer_counts
from tests import toy

LAYERS, WIDTH = 2, 160  # wide enough for Adafactor to factor and for 8 bits
AXES = {
    "kernel": ("embed", "mlp"),
    "bias": ("mlp",),
    "depthwise_kernel": (None, None, "mlp"),
    "modulation_table": (None, "embed"),
}
SHAPES = {
    "kernel": (WIDTH, WIDTH),
    "bias": (WIDTH,),
    "depthwise_kernel": (3, 3, WIDTH),
    "modulation_table": (6, WIDTH),
}
CASES = {name: dict(name=name) for name in OPTIMIZERS} | {"came8": dict(name="came", state_bits=8)}


def trees(seed):
    """The same numbers as {"blocks": stacked, "head": ...} and as a list of layers and the head.

    Each layer's are ten times those of the one before, and every other time ten times that: what
    a clip over the whole stack would mistake.
    """
    random = np.random.default_rng(seed)

    def layer(size):
        return {n: np.float32(size * random.normal(size=s)) for n, s in SHAPES.items()}

    layers = [layer(10.0 ** (i - 3 + (seed + i) % 2)) for i in range(LAYERS)]
    head = layer(0.01)
    return {"blocks": jax.tree.map(lambda *x: np.stack(x), *layers), "head": head}, {
        **{f"layer_{i}": x for i, x in enumerate(layers)},
        "head": head,
    }


def boxed(tree):
    """Boxes parameters with their logical axes; those of a stack start with "layers"."""

    def box(path, x):
        axes = AXES[path[-1].key]
        axes = ("layers", *axes) if path[0].key == "blocks" else axes
        return nn.LogicallyPartitioned(jnp.asarray(x), axes)

    return jax.tree_util.tree_map_with_path(box, tree)


def train(which, case, named=True, steps=3):
    """Returns the parameters after a few steps on tree `which` of `trees`."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=50.0, **CASES[case])
    params = trees(0)[which]
    tx, _ = make_optimizer(config, boxed(params) if named else params, 10)
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(steps):
        updates, state = update(trees(k + 1)[which], state, params)
        params = optax.apply_updates(params, updates)
    return params


def as_layers(params):
    layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(LAYERS)]
    return {**{f"layer_{i}": x for i, x in enumerate(layers)}, "head": params["head"]}


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in pairs)


@pytest.mark.parametrize("case", CASES)
def test_stacked_is_unrolled(case):
    """Equal to 1e-6, with updates of about 1e-2; not so if the stack's axis has no name."""
    unrolled = train(1, case)
    found = largest_difference(as_layers(train(0, case)), unrolled)
    without = largest_difference(as_layers(train(0, case, named=False)), unrolled)
    print(f"{case}: {found:.1e}, as one weight {without:.1e}")
    assert found < 1e-6
    assert (without > 1e-3) == (case != "adamw")


def test_layer_counts():
    stacked, unrolled = (boxed(tree) for tree in trees(0))
    assert set(layer_counts(stacked)["blocks"].values()) == {LAYERS}
    assert set(layer_counts(stacked)["head"].values()) == {0}
    assert set(jax.tree.leaves(layer_counts(unrolled))) == {0}


def test_axes_are_the_same_with_a_mesh_set():
    """With the mesh of the devices set, as in the loop; traced or not."""
    params = boxed(trees(0)[0])
    tx, _ = make_optimizer(OptimizerConfig(name="came"), params, 10)
    alone = nn.get_partition_spec(jax.eval_shape(tx.init, params))
    assert P("layers", "embed") in jax.tree.leaves(alone, is_leaf=lambda x: isinstance(x, P))
    with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2, devices=toy.devices(4))):
        assert nn.get_partition_spec(jax.eval_shape(tx.init, params)) == alone
        assert nn.get_partition_spec(tx.init(params)) == alone


def test_frozen_stack_costs_nothing():
    config = OptimizerConfig(name="came")
    params = boxed(trees(0)[0])
    tx, _ = make_optimizer(config, params, 10, ["head/.*"])
    size = sum(x.size for x in jax.tree.leaves(tx.init(params)))
    assert size < 2.5 * sum(x.size for x in jax.tree.leaves(params["head"]))
    params = nn.unbox(params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not any(x.any() for x in jax.tree.leaves(updates["blocks"]))


# Mesh axes of the states of the stacked kernel, (layers, embed, mlp), by shape.
BOTH, FSDP, TENSOR = P(None, "fsdp", "tensor"), P(None, "fsdp"), P(None, "tensor")
KERNEL_STATES = {
    "adamw": [BOTH, BOTH],
    "adafactor": [BOTH, FSDP, TENSOR],
    "muon": [BOTH],
    "came": [BOTH, FSDP, FSDP, TENSOR, TENSOR],
    "came8": [BOTH, P(None, "fsdp", None), FSDP, FSDP, TENSOR, TENSOR],
}


@pytest.mark.parametrize("case", CASES)
def test_state_on_a_mesh(case):
    """Each leaf is split as its parameter is; the updates equal those on one device."""
    stacked, _ = trees(0)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, **CASES[case])
    tx, _ = make_optimizer(config, boxed(stacked), 10)

    def init():
        params = boxed(stacked)
        return train_state.new_state(params, tx.init(params), jax.random.key(0), ema=False)

    def step(state, grads):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state)

    def two_steps(mesh):
        abstract, create = train_state.on_mesh(init, mesh)
        where = jax.tree.map(lambda x: x.sharding, abstract)
        state, run = create(), jax.jit(step, donate_argnums=0, out_shardings=where)
        for k in range(2):
            state = run(state, trees(k + 1)[0])
        return abstract, state

    _, alone = two_steps(sharding.make_mesh(devices=toy.devices(1)))
    abstract, split = two_steps(sharding.make_mesh(fsdp=2, tensor=2, devices=toy.devices(4)))
    assert largest_difference(split.params, alone.params) < 1e-6

    states = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    }
    found = [
        x.sharding.spec
        for name, x in states.items()
        if "blocks/kernel" in name and x.size > LAYERS  # Adafactor has placeholders of one number
    ]
    assert sorted(map(str, found)) == sorted(map(str, KERNEL_STATES[case]))
    whole = [n for n, x in states.items() if x.size >= WIDTH and x.sharding.is_fully_replicated]
    assert whole == []
