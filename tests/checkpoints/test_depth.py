"""Growth that starts at the smaller network, and pruning by importance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.components import Checkpoint, init_params, param_shapes
from sana_jax.checkpoints.depth import ZEROS, grow, most_important, new_weight, prune
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.models import flops
from sana_jax.models.config import MAX_LAYERS
from sana_jax.models.dit import PRESETS, Block, SanaConfig, SanaTransformer
from sana_jax.runtime.errors import UserError
from tests import toy

SOURCE_DEPTH, DEPTH = 4, 7
KINDS = {"plain": {}, "qk norm": dict(qk_norm="rms_norm_across_heads", attention_bias=True)}


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    module, config = toy.transformer(num_layers=SOURCE_DEPTH, **KINDS[request.param])
    return Checkpoint(None, config, params={"dit": toy.params(module, config)})


def arrays(checkpoint, dtype="float32"):
    return jax.tree.map(lambda x: np.asarray(x, jnp.dtype(dtype)), checkpoint.params["dit"])


def first_blocks(params, count):
    return {**params, "blocks": jax.tree.map(lambda x: x[:count], params["blocks"])}


def velocities(config, params, dtype):
    """The velocity as training computes it, and as sampling does."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 4, 6, config.latent_channels), np.float32)
    caption = rng.standard_normal((2, 5, config.caption_channels), np.float32)
    mask = np.arange(5)[None] < np.array([[5], [2]])
    module = SanaTransformer(config, dtype=dtype, param_dtype=dtype)

    def both(params, timestep):
        def apply(*inputs, **kwargs):
            return module.apply({"params": params}, *inputs, **kwargs)

        keys_values = apply(caption, method="keys_values")
        sampled = apply(latents, timestep, keys_values, mask, method="denoise")
        return apply(latents, timestep, caption, mask), sampled

    run = jax.jit(both)
    return [np.asarray(x) for time in (999, 500, 13) for x in run(params, jnp.float32([time]))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", [None, SOURCE_DEPTH])
def test_a_grown_network_computes_what_its_kept_blocks_do_to_the_bit(small, keep, dtype):
    """A network of one block is another matter: XLA compiles it without a loop."""
    grown, kept = grow(small, DEPTH, keep), keep or SOURCE_DEPTH - 2
    config = dataclasses.replace(small.dit, depth=kept)
    expected = velocities(config, first_blocks(arrays(small, dtype), kept), dtype)
    found = velocities(grown.dit, arrays(grown, dtype), dtype)
    for ours, smaller in zip(found, expected, strict=True):
        assert np.isfinite(ours).all() and ours.dtype == np.float32
        np.testing.assert_array_equal(ours.view(np.uint32), smaller.view(np.uint32))


def test_a_network_with_an_mlp_grows_to_the_bit_too():
    """Unlike Mix-FFN's, the MLP's last layer has a bias."""
    sizes = dict(width=32, head_dim=8, latent_channels=4, cross_heads=2, caption_channels=8)
    config = SanaConfig(depth=2, ffn="mlp", **sizes)
    params = nn.unbox(init_params(SanaTransformer(config), jax.random.key(0)))
    source = Checkpoint(None, config, params={"dit": params})
    grown = grow(source, 4, keep=2)
    expected = velocities(config, params, "float32")
    found = velocities(grown.dit, arrays(grown), "float32")
    for ours, smaller in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, smaller)


def test_a_new_block_adds_nothing_to_any_number(small):
    """To -0 it may add +0, which makes it +0; no difference is left."""
    config, dtype = small.dit, jnp.bfloat16
    block = jax.tree.map(lambda x: x[-1], arrays(grow(small, DEPTH), dtype)["blocks"])
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(-60, 60, (1, 4, 4, config.width))) * rng.choice([-1, 0, 1], config.width)
    x = jnp.asarray(x, dtype).at[:, 0].multiply(-1)
    assert np.signbit(np.asarray(x)[np.asarray(x) == 0]).any()
    keys_values = rng.standard_normal((1, 5, 2 * config.width), np.float32).astype(dtype)
    modulation = rng.standard_normal((1, 6, config.width), np.float32)
    after, _ = Block(config, dtype, dtype).apply(
        {"params": block},
        x,
        keys_values,
        modulation,
        jnp.ones((1, 5), bool),
        method="with_keys_values",
    )
    np.testing.assert_array_equal(np.asarray(after), np.asarray(x))


def test_every_branch_of_a_new_block_learns_at_once(small):
    grown = grow(small, DEPTH)
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((1, 4, 4, 8), np.float32)
    caption, mask = rng.standard_normal((1, 5, 48), np.float32), np.ones((1, 5), bool)

    def loss(params):
        model = SanaTransformer(grown.dit)
        return jnp.square(
            model.apply({"params": params}, latents, jnp.ones(1), caption, mask)
        ).sum()

    found = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(arrays(grown))["blocks"], sep="/")
    for name in found.keys() & set(ZEROS):
        for layer in range(SOURCE_DEPTH - 2, DEPTH):
            assert np.abs(found[name][layer]).max() > 0, (name, layer)


def test_new_weights_are_those_of_the_paper(small):
    blocks = traverse_util.flatten_dict(arrays(grow(small, 40, seed=3))["blocks"], sep="/")
    zeros = {name for name, stack in blocks.items() if not stack[2:].any()}
    assert zeros == blocks.keys() & set(ZEROS)
    for name, stack in blocks.items():
        new = stack[2:]
        if name.endswith("_norm/scale"):
            assert (new == 1).all(), name
        elif name not in zeros:
            deviation = 0.2 if "depthwise" in name else 0.02
            assert new.std() == pytest.approx(deviation, rel=0.1), name
            assert abs(new.mean()) < 0.1 * deviation, name
            assert len({layer.tobytes() for layer in new}) == len(new), name


def test_new_weights_depend_on_seed_name_and_layer_alone():
    weight = new_weight("ffn/expand/kernel", (3, 4), 1, 5)
    np.testing.assert_array_equal(weight, new_weight("ffn/expand/kernel", (3, 4), 1, 5))
    others = (
        ("ffn/expand/kernel", 2, 5),
        ("ffn/expand/kernel", 1, 6),
        ("attention/qkv/kernel", 1, 5),
    )
    for name, seed, layer in others:
        assert (weight != new_weight(name, (3, 4), seed, layer)).all()


def test_kept_weights_keep_their_bits_and_their_type(small):
    blocks = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params["dit"]["blocks"])
    source = dataclasses.replace(small, params={"dit": {**small.params["dit"], "blocks": blocks}})
    grown, pruned = grow(source, DEPTH), prune(source, 2, lambda depth: [0.5, 0.1, 0.1, 0.3])
    for changed, ours, theirs in (
        (grown, slice(2), slice(2)),
        (pruned, slice(None), [0, 3]),
    ):
        flat = traverse_util.flatten_dict(changed.params["dit"], sep="/")
        for name, before in traverse_util.flatten_dict(source.params["dit"], sep="/").items():
            now = np.asarray(flat[name])
            assert now.dtype == before.dtype and now.shape == flat[name].shape, name
            is_stack = name.startswith("blocks/")
            same = (now[ours], before[theirs]) if is_stack else (now, before)
            np.testing.assert_array_equal(*same, err_msg=name)
        shapes = {name: leaf.shape for name, leaf in param_shapes(changed.dit).items()}
        assert {name: leaf.shape for name, leaf in flat.items()} == shapes


def test_the_paper_s_large_model_is_grown_from_its_small_one_without_reading_a_weight():
    def unread(dtype):
        raise AssertionError("a weight was read")

    made = random_weights.make("sana1.5_1600m_1024", "bfloat16")
    lazy = jax.tree.map(lambda x: LazyArray(x.shape, x.dtype, unread), made.params["dit"])
    grown = grow(dataclasses.replace(made, params={**made.params, "dit": lazy}), 60)
    large = PRESETS["sana1.5_4800m_1024"]
    assert grown.dit == large
    assert flops.blocks(grown.dit, 1024, 300) == 3 * flops.blocks(made.dit, 1024, 300)
    shapes = {name: leaf.shape for name, leaf in param_shapes(large).items()}
    flat = traverse_util.flatten_dict(grown.params["dit"], sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == shapes
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype(jnp.bfloat16)}
    assert grown.provenance["depth"] == [{"grown": 60, "from": 20, "kept": 18, "seed": 0}]
    back = prune(grown, 20, lambda depth: [1.0] * 18 + [0.0] * 41 + [2.0])
    assert back.dit == made.dit
    first, second = back.provenance["depth"]
    assert first == grown.provenance["depth"][0]
    assert (second["pruned"], second["from"]) == (20, 60)
    assert second["kept"] == [*range(19), 59]


def test_the_most_important_blocks_stay_in_order():
    assert most_important([0.5, 0.1, 0.4, 0.2], 2) == [0, 2]
    assert most_important([0.1, 0.2, 0.2, 0.9], 2) == [1, 3]
    assert most_important([0.3, 0.3, 0.3], 2) == [0, 1]


@pytest.mark.parametrize(
    "depth, keep, words",
    [
        (4, None, "--grow=4: --source has 4 blocks; give 5 to 1000$"),
        (3, None, "--grow=3: .*, or fewer by --prune"),
        (MAX_LAYERS + 1, None, "--grow=1001: .*give 5 to 1000"),
        (5, 0, "--keep=0: --source has 4 blocks; give 1 to 4"),
        (9, 5, "--keep=5: --source has 4 blocks; give 1 to 4"),
    ],
)
def test_growth_that_makes_no_sense_is_refused(small, depth, keep, words):
    with pytest.raises(UserError, match=words):
        grow(small, depth, keep)


def test_of_two_blocks_the_user_says_which_stay(small):
    two = prune(small, 2, range)
    with pytest.raises(UserError, match="last 2 blocks, and --source has 2: .* --keep"):
        grow(two, 4)
    assert grow(two, 4, keep=2).dit.depth == 4


@pytest.mark.parametrize(
    "depth, words",
    [
        (0, "--prune=0: --source has 4 blocks; give 1 to 3$"),
        (4, "--prune=4: --source has 4 blocks; give 1 to 3$"),
        (5, "--prune=5: .*give 1 to 3, or more by --grow"),
    ],
)
def test_pruning_to_a_depth_that_is_none_is_refused(small, depth, words):
    def unread(depth):
        raise AssertionError("the importance was read")

    with pytest.raises(UserError, match=words):
        prune(small, depth, unread)


def test_one_block_and_an_autoencoder_alone_are_refused(small):
    one = prune(small, 1, range)
    with pytest.raises(UserError, match="--source has 1 blocks; it cannot be pruned"):
        prune(one, 1, range)
    alone = Checkpoint(None)
    with pytest.raises(UserError, match="--grow is for a checkpoint with a transformer"):
        grow(alone, 9)
    with pytest.raises(UserError, match="--prune is for a checkpoint with a transformer"):
        prune(alone, 1, range)
