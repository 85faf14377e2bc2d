"""The linear DiT against diffusers, in float32 with random weights of every kind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from sana_jax import sharding
from sana_jax.checkpoints.components import abstract_params
from sana_jax.models.dit import PRESETS, SanaConfig, SanaTransformer
from sana_jax.runtime.errors import UserError
from tests import toy

TIMESTEPS = (999, 847, 562, 249, 13)
# Non-square, with text of 11 rows of which 11, 4 and 1 count.
BATCH, HEIGHT, WIDTH, ROWS = 3, 6, 10, 11
LENGTHS = (11, 4, 1)

KINDS = {
    "plain": {},
    "qk norm": dict(qk_norm="rms_norm_across_heads"),
    "positions": dict(interpolation_scale=1.0),
    "positions interpolated": dict(interpolation_scale=2.0, sample_size=16),
    # 70 heads of 32 and 20 of 112, as a fourteenth of it: ragged against every power of two.
    "1.6B-like": dict(
        num_attention_heads=7,
        attention_head_dim=32,
        num_cross_attention_heads=2,
        cross_attention_head_dim=112,
        cross_attention_dim=224,
    ),
    "patches of 2": dict(patch_size=2),
    "attention bias": dict(attention_bias=True),
}


@functools.partial(jax.jit, static_argnums=0)
def apply(model: SanaTransformer, params, *args):
    return model.apply({"params": params}, *args)


def inputs(config: SanaConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((BATCH, HEIGHT, WIDTH, config.latent_channels), np.float32)
    caption = 3 * rng.standard_normal((BATCH, ROWS, config.caption_channels), np.float32)
    mask = np.arange(ROWS)[None] < np.array(LENGTHS)[:, None]
    return latents, caption, mask


@torch.no_grad()
def reference(module, latents, timestep, caption, mask, guidance=None):
    """diffusers' velocity, channels last in float32, in the module's dtype."""
    dtype = next(module.parameters()).dtype
    out = module(
        torch.tensor(latents).permute(0, 3, 1, 2).to(dtype),
        encoder_hidden_states=torch.tensor(caption).to(dtype),
        timestep=torch.full((len(latents),), timestep),
        encoder_attention_mask=torch.tensor(mask).int(),
        guidance=None if guidance is None else torch.tensor(guidance).to(dtype),
    ).sample
    return out.float().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_velocity_is_that_of_diffusers(kind):
    module, config = toy.transformer(**KINDS[kind])
    params = toy.params(module, config)
    latents, caption, mask = inputs(config)
    for timestep in TIMESTEPS:
        # One timestep for the batch, then one an image: both are allowed.
        times = [float(timestep)] if timestep > 500 else [float(timestep)] * BATCH
        ours = apply(SanaTransformer(config), params, latents, jnp.array(times), caption, mask)
        theirs = reference(module, latents, timestep, caption, mask)
        toy.assert_close(ours, theirs, 1e-5, f"{kind}, timestep {timestep}")


def test_velocity_of_sprint_is_that_of_diffusers():
    """The guidance scale is an input, one for each image; diffusers' pipeline multiplies it."""
    module, config = toy.transformer(**toy.SPRINT)
    params = toy.params(module, config)
    latents, caption, mask = inputs(config)
    scales = np.array([4.5, 1.0, 7.0], np.float32)
    for time in (1.0, 0.783, 0.4, 0.01):
        given = latents, jnp.full(1, time), caption, mask
        ours = apply(SanaTransformer(config), params, *given, jnp.asarray(scales))
        theirs = reference(module, latents, time, caption, mask, 0.1 * scales)
        toy.assert_close(ours, theirs, 1e-5, f"time {time}")
    one = apply(SanaTransformer(config), params, *given, jnp.full(1, 4.5))
    assert toy.relative_error(one[1:], ours[1:]) > 1e-3  # the scale changes the velocity
    toy.assert_close(one[0], ours[0], 1e-6)


def test_only_sprint_takes_a_guidance_scale():
    for kind, guidance in ({}, jnp.ones(1)), (toy.SPRINT, None):
        module, config = toy.transformer(**kind)
        given = *inputs(config), jnp.array([0.5])
        latents, caption, mask, time = given
        with pytest.raises(ValueError, match="an input of Sprint's networks, and of no others"):
            apply(
                SanaTransformer(config),
                toy.params(module, config),
                *(latents, time, caption, mask, guidance),
            )


def test_native_size_positions():
    """At the native size diffusers takes its positions from a table made in advance."""
    module, config = toy.transformer(interpolation_scale=2.0)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 8, 8, 8), np.float32)
    _, caption, mask = inputs(config)
    caption, mask = caption[:1], mask[:1]
    params, timestep = toy.params(module, config), jnp.array([500.0])
    ours = apply(SanaTransformer(config), params, latents, timestep, caption, mask)
    toy.assert_close(ours, reference(module, latents, 500, caption, mask), 1e-5)


def test_hidden_rows_change_nothing():
    module, config = toy.transformer()
    params = toy.params(module, config)
    latents, caption, mask = inputs(config)
    noisy = np.where(mask[..., None], caption, 100.0).astype(np.float32)
    expected, found = (
        apply(SanaTransformer(config), params, latents, jnp.array([500.0]), rows, mask)
        for rows in (caption, noisy)
    )
    np.testing.assert_array_equal(expected, found)


def test_keys_and_values_once_a_prompt():
    """Samplers hoist them out of the loop: the same velocity, without the caption."""
    module, config = toy.transformer(qk_norm="rms_norm_across_heads")
    params = toy.params(module, config)
    latents, caption, mask = inputs(config)
    model, timestep = SanaTransformer(config), jnp.array([420.0])
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    keys_values = model.apply(variables, caption, method="keys_values")
    assert keys_values.shape == (3, BATCH, ROWS, 2 * 2 * 32)
    ours = model.apply(variables, latents, timestep, keys_values, mask, method="denoise")
    toy.assert_close(ours, apply(model, params, latents, timestep, caption, mask), 1e-6)


@pytest.mark.parametrize("method", ["keys_values", "denoise"])
def test_no_stack_of_weights_is_widened(method):
    """XLA's CPU backend would keep all layers in float32, twice the bfloat16 weights."""
    config = SanaConfig(depth=40, width=64, cross_heads=2, caption_channels=48, sample_size=2)
    model = SanaTransformer(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    rest = array(1, 2, 2, 32), array(1)
    caption, mask = array(1, 4, 48), array(1, 4, dtype=bool)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *rest, caption, mask))
    keys_values = array(40, 1, 4, 128, dtype=jnp.bfloat16)
    inputs = (caption,) if method == "keys_values" else (*rest, keys_values, mask)
    apply = jax.jit(functools.partial(model.apply, method=method))
    memory = apply.lower(variables, *inputs).compile().memory_analysis()
    blocks = variables["params"]["blocks"]
    read = blocks["cross_attention"]["kv"] if method == "keys_values" else blocks
    assert memory.temp_size_in_bytes < sum(2 * leaf.size for leaf in jax.tree.leaves(read)) / 2


def exploding(**changes):
    """A model whose linear attention leaves float16's range, as the published weights' does."""
    module, config = toy.transformer(**changes)
    with torch.no_grad():
        module.transformer_blocks[1].attn1.to_out[0].weight *= 1e5
        # What follows must stay in range: the gate, and the projection that reads the raw stream.
        module.time_embed.linear.weight *= 0.1
        for block in module.transformer_blocks:
            block.attn2.to_q.weight *= 1e-3
            block.scale_shift_table.clip_(-0.5, 0.5)
    return module, config


@pytest.mark.parametrize("clip", [None, True, False])
def test_clip_attention(clip):
    module, config = exploding()
    config = dataclasses.replace(config, clip_attention=clip)
    params = toy.params(module, config)
    latents, caption, mask = inputs(config)
    ours = apply(SanaTransformer(config), params, latents, jnp.array([500.0]), caption, mask)
    free = reference(module, latents, 500, caption, mask)

    def clipped(_, __, output):
        return output.clip(-65504, 65504)

    for block in module.transformer_blocks:
        block.attn1.register_forward_hook(clipped)
    held = reference(module, latents, 500, caption, mask)
    assert toy.relative_error(free, held) > 1e-2, "the weights are too small to reach the clip"
    toy.assert_close(ours, held if clip else free, 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_clip_attention_by_dtype(dtype):
    """None clips in float16, as diffusers does, and in no other type."""
    module, config = exploding()
    params = toy.params(module, config)
    latents, caption, mask = inputs(config)

    def run(clip):
        model = SanaTransformer(dataclasses.replace(config, clip_attention=clip), dtype=dtype)
        return apply(model, params, latents, jnp.array([500.0]), caption, mask)

    same = np.array_equal(run(None), run(True))
    assert same == (dtype == "float16")
    assert np.isfinite(run(None)).all()


def test_bfloat16_error_is_no_larger_than_that_of_diffusers():
    ours, theirs = [], []
    for seed in range(8):
        module, config = toy.transformer(seed, num_layers=4)
        latents, caption, mask = inputs(config, seed)
        exact = reference(module, latents, 749, caption, mask)
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.params(module, config))
        model = SanaTransformer(config, dtype=jnp.bfloat16)
        out = apply(model, params, latents, jnp.array([749.0]), caption, mask)
        half = reference(module.to(torch.bfloat16), latents, 749, caption, mask)
        ours.append(toy.relative_error(out, exact))
        theirs.append(toy.relative_error(half, exact))
    ours, theirs = np.median(ours), np.median(theirs)
    print(f"bfloat16 error: ours {ours:.2e}, diffusers' {theirs:.2e}")
    assert ours <= 1.5 * theirs
    assert ours > 1e-4, "this is not bfloat16"


def test_blocks_without_a_loop_are_computed_again_too():
    """Fully unrolled, remat has its price in operations still: XLA did not merge it away."""
    module, config = toy.transformer(num_layers=2)
    params = toy.params(module, config)
    args = jnp.ones((1, 8, 8, config.latent_channels)), jnp.ones(1)
    args += jnp.ones((1, ROWS, config.caption_channels)), jnp.ones((1, ROWS), bool)

    def flops(**fields):
        model = SanaTransformer(config, unroll=config.depth, **fields)
        loss = lambda params: jnp.sum(model.apply({"params": params}, *args) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    assert flops(remat="full") > 1.15 * flops()


MESHES = [dict(sequence=4), dict(fsdp=2, sequence=2), dict(replica=2, sequence=4)]


@functools.cache
def split_case(implementation: str = "auto", remat: str = "none"):
    """A config, fn of a flow loss -> ((loss, velocity), gradients), and its operands."""
    module, config = toy.transformer(num_layers=2, qk_norm="rms_norm_across_heads")
    config = dataclasses.replace(config, interpolation_scale=1.0)
    model = SanaTransformer(config, remat=remat, implementation=implementation)
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((4, 8, 6, config.latent_channels), np.float32)
    velocity = rng.standard_normal(latents.shape, np.float32)
    caption = rng.standard_normal((4, ROWS, config.caption_channels), np.float32)
    mask = np.arange(ROWS)[None] < np.array([11, 4, 1, 7])[:, None]
    times = np.array([900.0, 500.0, 300.0, 20.0], np.float32)

    def fn(params, latents, times, caption, mask, velocity):
        def loss(params):
            found = model.apply({"params": params}, latents, times, caption, mask)
            return jnp.mean((found - velocity) ** 2), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    operands = toy.params(module, config), latents, times, caption, mask, velocity
    return config, fn, operands


@functools.cache
def whole():
    _, fn, operands = split_case()
    return jax.jit(fn)(*operands)


def assert_same_on(sizes, implementation="auto", remat="none"):
    config, fn, (params, *batch) = split_case(implementation, remat)
    sizes = {"replica": 1, **sizes}
    mesh = sharding.make_mesh(**sizes, devices=toy.devices(int(np.prod(list(sizes.values())))))
    params = jax.device_put(params, sharding.shardings_for(abstract_params(config), mesh))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        fast = {"xla_backend_optimization_level": 0}  # compiling is what takes the time
        (loss, velocity), gradients = jax.jit(fn, compiler_options=fast)(params, *batch)
    (expected_loss, expected_velocity), expected = whole()
    toy.assert_close(loss, expected_loss, 1e-5, f"{sizes}: loss")
    toy.assert_close(velocity, expected_velocity, 1e-5, f"{sizes}: velocity")
    for (path, found), one in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        toy.assert_close(found, one, 1e-5, jax.tree_util.keystr(path))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_tokens_over_devices(sizes):
    """Velocity and gradients of a flow loss are those of one device."""
    assert_same_on(sizes)


def test_tokens_over_devices_with_kernels_and_remat():
    """All mesh axes at once; the kernels' plain forms, under the exchanges that kernels need."""
    assert_same_on(dict(fsdp=2, sequence=2, tensor=2), "pallas", "full")


def test_rows_that_do_not_divide_are_refused():
    config, fn, (params, latents, *rest) = split_case()
    with jax.set_mesh(sharding.make_mesh(sequence=4, devices=toy.devices(4))):
        with pytest.raises(UserError, match=r"6 x 6 tokens does not split .* sequence=4"):
            jax.eval_shape(fn, params, latents[:, :6], *rest)
        jax.eval_shape(  # where parameters are made, sizes are those of nothing
            SanaTransformer(config).init, jax.random.key(0), latents[:, :1], *rest[:-1]
        )


@pytest.mark.parametrize(
    "preset, count",
    [
        ("sana_600m_512", 591_747_872),
        ("sana_600m_1024", 591_747_872),
        ("sana_1600m_512", 1_604_462_752),
        ("sana_1600m_1024", 1_604_462_752),
        ("sana_1600m_2048", 1_604_462_752),
        ("sana_1600m_4096", 1_604_462_752),
        ("sana1.5_1600m_1024", 1_604_641_952),
        ("sana1.5_4800m_1024", 4_721_825_952),
    ],
)
def test_parameter_count(preset, count):
    model = SanaTransformer(PRESETS[preset])
    latents, caption = jnp.zeros((1, 2, 2, 32)), jnp.zeros((1, 1, 2304))
    params = jax.eval_shape(
        model.init, jax.random.key(0), latents, jnp.zeros(1), caption, jnp.ones((1, 1), bool)
    )
    assert sum(x.size for x in jax.tree.leaves(params)) == count
