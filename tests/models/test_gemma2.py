"""Gemma-2 against transformers, in float32 with random weights of every kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from flax import traverse_util

from sana_jax.checkpoints.diffusers_configs import config_json
from sana_jax.models.gemma2 import Gemma2, Gemma2Config
from sana_jax.sharding import batch_sharding, make_mesh, shardings_for
from tests import toy

TOY = Gemma2Config(
    vocab_size=97,
    hidden_size=60,  # its root is no bfloat16
    intermediate_size=88,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=14,
    query_pre_attn_scalar=7,
    attn_logit_softcap=1.5,  # bends most logits
    sliding_window=4,
    rms_norm_eps=1e-5,
)
KERNELS = {
    "q": (2304, 2048),
    "k": (2304, 1024),
    "v": (2304, 1024),
    "o": (2048, 2304),
    "gate": (2304, 9216),
    "up": (2304, 9216),
    "down": (9216, 2304),
}
replace = dataclasses.replace
KINDS = {
    "grouped queries": TOY,
    "one key-value head": replace(TOY, num_kv_heads=1),
    "a key-value head a query head": replace(TOY, num_kv_heads=6),
    "no cap": replace(TOY, attn_logit_softcap=None),
    "no window": replace(TOY, sliding_window=None),
    "odd layers slide": replace(TOY, sliding_layers=(False, True, False)),
    "small theta": replace(TOY, rope_theta=50.0),
    "2b-like": replace(TOY, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcap=50.0),
}


@functools.cache
def reference(config: Gemma2Config):
    """transformers' Gemma-2 with random weights, and these as our parameters."""
    same = transformers.Gemma2Config(**config_json(config), attn_implementation="eager")
    module = toy.randomise(transformers.Gemma2Model(same))
    module.embed_tokens.embed_scale.fill_(config.hidden_size**0.5)  # a constant, not a weight
    return module, toy.params(module, config)


@torch.no_grad()
def theirs(config, tokens, mask=None):
    module, _ = reference(config)
    mask = None if mask is None else torch.tensor(mask).long()
    return module(torch.tensor(tokens).long(), attention_mask=mask)[0].numpy()


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(config, dtype, params, tokens):
    return Gemma2(config, dtype).apply({"params": params}, tokens)


def ours(config, tokens, dtype=jnp.float32):
    return np.asarray(apply(config, dtype, reference(config)[1], jnp.asarray(tokens)))


def random_tokens(batch: int, length: int, seed: int = 0):
    shape = (batch, length)
    return np.random.default_rng(seed).integers(0, TOY.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_transformers(kind):
    config = KINDS[kind]
    for length in (1, 5, 33):
        tokens = random_tokens(2, length)
        toy.assert_close(ours(config, tokens), theirs(config, tokens), 2e-5, f"{kind}, {length}")


@pytest.mark.parametrize("kind", ["no cap", "no window", "odd layers slide", "small theta"])
def test_toy_feels_its_fields(kind):
    """Else the parity above would not see them."""
    tokens = random_tokens(2, 33)
    params = reference(TOY)[1]
    other = apply(KINDS[kind], jnp.float32, params, tokens)
    assert toy.relative_error(other, ours(TOY, tokens)) > 0.05


def test_padding_changes_no_row_of_the_text():
    lengths = (1, 3, 8, 13)
    tokens = random_tokens(len(lengths), 13)
    mask = np.arange(13)[None] < np.array(lengths)[:, None]
    tokens[~mask] = 0
    padded, reference_rows = ours(TOY, tokens), theirs(TOY, tokens, mask)
    toy.assert_close(padded[mask], reference_rows[mask], 2e-5, "padded")
    for row, length in enumerate(lengths):
        cropped = ours(TOY, tokens[row : row + 1, :length])
        toy.assert_close(padded[row : row + 1, :length], cropped, 1e-6, f"length {length}")


@pytest.mark.parametrize("kind", ["grouped queries", "no window"])
def test_rows_of_padding_are_those_of_transformers(kind):
    """Within the window of the text they see the text alone, and beyond it the mean of all."""
    config, lengths = KINDS[kind], (1, 3, 8, 13)
    tokens = random_tokens(len(lengths), 13)
    mask = np.arange(13)[None] < np.array(lengths)[:, None]
    params = {"params": reference(config)[1]}
    for trains in (False, True):
        found = jax.jit(Gemma2(config, trains=trains).apply)(params, tokens, None, mask)
        toy.assert_close(found, theirs(config, tokens, mask), 2e-5, "padding")
    assert toy.relative_error(ours(config, tokens)[~mask], np.asarray(found)[~mask]) > 0.05


@pytest.mark.parametrize("kind", ["grouped queries", "no window", "odd layers slide"])
def test_rows_after_a_prefix_are_those_of_the_whole(kind):
    config = KINDS[kind]
    apply = jax.jit(Gemma2(config).apply, static_argnames="method")
    params, tokens = {"params": reference(config)[1]}, random_tokens(3, 33)
    tokens[:, :20] = tokens[0, :20]
    whole = ours(config, tokens)
    for length in (1, 3, 20):  # around the sliding window, 4
        prefix = apply(params, tokens[:1, :length], method="read_prefix")
        assert prefix.keys.shape == (3, 1, length, config.num_kv_heads, config.head_dim)
        toy.assert_close(prefix.first[0], whole[0, 0], 2e-6, "first row")
        rows = apply(params, tokens[:, length:], prefix)
        toy.assert_close(rows, whole[:, length:], 2e-6, f"{kind}, {length}")


def test_keys_and_values_that_nobody_reads_are_not_kept():
    config = replace(TOY, num_layers=40)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    model = Gemma2(config)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    memory = jax.jit(model.apply).lower(params, tokens).compile().memory_analysis()
    keys_values = 2 * 4 * 40 * 64 * config.num_kv_heads * config.head_dim
    assert memory.temp_size_in_bytes < keys_values


def test_no_stack_of_weights_is_widened():
    """XLA's CPU backend would keep all layers in float32, twice the bfloat16 weights."""
    config = replace(TOY, num_layers=40)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    model = Gemma2(config, jnp.bfloat16, jnp.bfloat16)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    memory = jax.jit(model.apply).lower(params, tokens).compile().memory_analysis()
    layers = sum(2 * leaf.size for leaf in jax.tree.leaves(params["params"]["layers"]))
    assert memory.temp_size_in_bytes < layers / 2


def test_gradients_take_no_stack_beside_their_own():
    """They come out of a scan layer by layer; those of a stack it closes over are summed up."""
    config = replace(TOY, num_layers=16, hidden_size=64)
    tokens = jnp.arange(8)[None]
    params = nn.unbox(Gemma2(config).init(jax.random.key(0), tokens))
    found = []
    for trains in (True, False):
        apply = Gemma2(config, trains=trains).apply
        gradient = jax.jit(jax.grad(lambda params, apply=apply: (apply(params, tokens) ** 2).sum()))
        compiled = gradient.lower(params).compile()
        found.append((compiled(params), compiled.memory_analysis().temp_size_in_bytes))
    (ours, memory), (slow, _) = found
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours, slow)
    assert memory < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params["params"]["layers"]))


def test_embedding_is_scaled_in_the_dtype_of_the_weights():
    """sqrt(60) = 7.746 is 7.75 in bfloat16."""
    # The branches are silent, and the norm at the end divides by its epsilon only.
    config = replace(TOY, num_layers=1, rms_norm_eps=1e12)
    model = Gemma2(config, jnp.float32, jnp.bfloat16)
    tokens = np.arange(20, dtype=np.int32)[None]
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(abstract))
    embedding = jax.random.normal(jax.random.key(0), (97, 60), jnp.bfloat16)
    params["params"]["embed"]["embedding"] = embedding
    rows = model.apply(params, tokens)  # not under jit, which may skip roundings

    embed = reference(TOY)[0].embed_tokens
    embed = type(embed)(97, 60, 0, embed_scale=60**0.5).bfloat16()
    with torch.no_grad():
        embed.weight.copy_(torch.tensor(np.asarray(embedding, np.float32)))
        expected = embed(torch.tensor(tokens)).float().numpy()
    toy.assert_close(np.asarray(rows) * 1e6, expected, 1e-5)


def test_bfloat16():
    tokens = random_tokens(2, 17)
    rows = ours(TOY, tokens, jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16
    toy.assert_close(rows.astype(np.float32), ours(TOY, tokens), 5e-2)  # 8 bits, 3 layers


def test_sharded_over_a_mesh():
    config = replace(TOY, vocab_size=98)
    params, tokens = reference(config)[1], random_tokens(4, 9)
    mesh = make_mesh(replica=2, fsdp=2, tensor=2)
    model = Gemma2(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings_for(abstract, mesh))
        rows = jax.jit(model.apply)(
            {"params": sharded}, jax.device_put(tokens, batch_sharding(mesh))
        )
    assert sharded["layers"]["gate"]["kernel"].sharding.shard_shape((3, 60, 88)) == (3, 30, 44)
    toy.assert_close(rows, ours(config, tokens), 2e-6)


@pytest.fixture(scope="module")
def full_size():
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(Gemma2(Gemma2Config()).init, jax.random.key(0), tokens)["params"]


def test_full_size(full_size):
    assert sum(x.size for x in jax.tree.leaves(full_size)) == 2_614_341_888
    shapes = jax.tree.map(jnp.shape, nn.unbox(full_size))
    square = {name: {"kernel": (26, *shape)} for name, shape in KERNELS.items()}
    norms = ("input_norm", "post_attention_norm", "pre_ffn_norm", "post_ffn_norm")
    assert shapes == {
        "embed": {"embedding": (256000, 2304)},
        "layers": {**square, **{name: {"scale": (26, 2304)} for name in norms}},
        "final_norm": {"scale": (2304,)},
    }


def test_logical_axes(full_size):
    specs = traverse_util.flatten_dict(nn.get_partition_spec(full_size), sep="/")
    expected = {"embed/embedding": ("vocab", "embed"), "final_norm/scale": ("embed",)}
    for name in KERNELS:
        hidden = "heads" if name in "qkvo" else "mlp"
        axes = (hidden, "embed") if name in ("o", "down") else ("embed", hidden)
        expected[f"layers/{name}/kernel"] = ("layers", *axes)
    assert {path: tuple(specs[path]) for path in expected} == expected


def test_sliding_layers_must_name_every_layer():
    with pytest.raises(ValueError, match="sliding_layers"):
        Gemma2Config(sliding_layers=(True, False))
