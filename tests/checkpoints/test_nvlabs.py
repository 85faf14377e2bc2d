"""The official .pth files of the transformer, made from diffusers' weights under official names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax.checkpoints.components import param_shapes
from sana_jax.checkpoints.nvlabs import dit_entries, load_dit, open_checkpoint
from sana_jax.models.dit import PRESETS, SanaConfig, SanaTransformer
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import toy
from tests.models.test_dit import apply, inputs, reference

KINDS = {
    "Sana_toy_512px.pth": dict(sample_size=16),
    "Sana_toy_1024px.pth": dict(sample_size=32),
    "SANA1.5_toy_1024px.pth": dict(sample_size=32, qk_norm="rms_norm_across_heads"),
    "Sana_toy_2Kpx_BF16.pth": dict(sample_size=64, interpolation_scale=1.0),
    "Sana_toy_4Kpx_BF16.pth": dict(sample_size=128, interpolation_scale=2.0),
    "Sana_toy_P2_1024px.pth": dict(sample_size=32, patch_size=2),
    "Sana_toy_wide_1024px.pth": dict(sample_size=32, mlp_ratio=2.7),
    "Sana_Sprint_toy_1024px.pth": dict(sample_size=32, **toy.SPRINT),
}
# theirs in diffusers -> official, for what has another name and the same contents
NAMES = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
    "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    "time_embed.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "caption_norm": "attention_y_norm",
    "proj_out": "final_layer.linear",
}
BLOCK_NAMES = {
    "attn1.to_out.0": "attn.proj",
    "attn1.norm_q": "attn.q_norm",
    "attn1.norm_k": "attn.k_norm",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "attn2.norm_q": "cross_attn.q_norm",
    "attn2.norm_k": "cross_attn.k_norm",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
    "ff.conv_depth": "mlp.depth_conv.conv",
    "ff.conv_point": "mlp.point_conv.conv",
}


def official(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A transformer's state dict under the names of NVIDIA's repository."""
    theirs = dict(module.state_dict())
    theirs.pop("patch_embed.pos_embed", None)
    found = {"final_layer.scale_shift_table": theirs.pop("scale_shift_table")}
    for i in range(module.config.num_layers):
        ours, block = f"blocks.{i}", f"transformer_blocks.{i}"
        found[f"{ours}.scale_shift_table"] = theirs.pop(f"{block}.scale_shift_table")
        thirds = [theirs.pop(f"{block}.attn1.to_{t}.weight") for t in "qkv"]
        found[f"{ours}.attn.qkv.weight"] = torch.cat(thirds)
        for end in ("weight", "bias"):
            halves = [theirs.pop(f"{block}.attn2.to_{t}.{end}") for t in "kv"]
            found[f"{ours}.cross_attn.kv_linear.{end}"] = torch.cat(halves)
    for name, tensor in theirs.items():
        layer, _, end = name.rpartition(".")
        if layer.startswith("transformer_blocks."):
            _, i, part = layer.split(".", 2)
            found[f"blocks.{i}.{BLOCK_NAMES[part]}.{end}"] = tensor
        else:
            found[f"{NAMES[layer]}.{end}"] = tensor
    return found


def small(seed: int = 0, **changes):
    """A module of diffusers and our config; heads are 32 wide, as in every official model."""
    changes = {"num_attention_heads": 2, "attention_head_dim": 32, **changes}
    return toy.transformer(seed, **changes)


def load(path, dtype="float32", **kwargs):
    return load_dit(path, dtype, make_mesh(devices=toy.devices(1)), cross_heads=2, **kwargs)


def assert_params(params, module, config, dtype="float32"):
    expected = jax.tree.map(lambda x: x.astype(dtype), toy.params(module, config))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("name", KINDS)
def test_velocity_is_that_of_diffusers(tmp_path, name):
    module, expected = small(**KINDS[name])
    torch.save({"state_dict": official(module)}, tmp_path / name)
    config, params = load(tmp_path / name)
    expected = dataclasses.replace(expected, mlp_ratio=config.mlp_ratio)
    assert config == expected
    assert_params(params, module, config)
    latents, caption, mask = inputs(config)
    timestep, guidance = 847, ()
    if config.is_sprint:
        timestep, guidance = 0.847, (np.full(3, 4.5, np.float32),)
    given = latents, jnp.array([timestep], jnp.float32), caption, mask, *guidance
    ours = apply(SanaTransformer(config), params, *given)
    scaled = (0.1 * scale for scale in guidance)
    theirs = reference(module, latents, timestep, caption, mask, *scaled)
    toy.assert_close(ours, theirs, 1e-5, name)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types(tmp_path, stored, dtype):
    module, _ = small(sample_size=32)
    module = module.to(stored)
    torch.save(official(module), tmp_path / "Sana_1024px.pth")
    config, params = load(tmp_path / "Sana_1024px.pth", dtype)
    assert params["proj_out"]["kernel"].dtype == dtype
    assert_params(params, module, config, dtype)


def test_training_checkpoint(tmp_path):
    """Both sets of weights, everything that training adds, and buffers that are not read."""
    (module, _), (average, _) = small(0), small(1)
    buffers = {
        "pos_embed": torch.zeros(1, 256, 64),
        "y_embedder.y_embedding": torch.full((300, 48), math.nan),
        "logvar_linear.weight": torch.zeros(1, 64),
        "logvar_linear.bias": torch.zeros(1),
    }
    optimizer = torch.optim.AdamW(module.parameters())
    contents = {
        "state_dict": {**buffers, **official(module)},
        "state_dict_ema": {**buffers, **official(average)},
        "optimizer": optimizer.state_dict(),
        "epoch": 1,
        "rng_state": {"torch": torch.get_rng_state(), "numpy": np.random.get_state()},
    }
    path = tmp_path / "epoch_1_step_2.pth"
    torch.save(contents, path)
    for use_ema, expected in ((False, module), (True, average)):
        config, params = load(path, use_ema=use_ema)
        assert config.sample_size == 16  # the side of 256 positions
        assert_params(params, expected, config)
    del contents["state_dict_ema"]
    torch.save(contents, path)
    with pytest.raises(UserError, match="no state_dict_ema"):
        load(path, use_ema=True)


def table(config: SanaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published model, as its source defines them."""
    width, hidden = config.width, 5 * config.width // 2
    block = {
        "scale_shift_table": (6, width),
        "attn.qkv.weight": (3 * width, width),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "cross_attn.q_linear.weight": (width, width),
        "cross_attn.q_linear.bias": (width,),
        "cross_attn.kv_linear.weight": (2 * width, width),
        "cross_attn.kv_linear.bias": (2 * width,),
        "cross_attn.proj.weight": (width, width),
        "cross_attn.proj.bias": (width,),
        "mlp.inverted_conv.conv.weight": (2 * hidden, width, 1, 1),
        "mlp.inverted_conv.conv.bias": (2 * hidden,),
        "mlp.depth_conv.conv.weight": (2 * hidden, 1, 3, 3),
        "mlp.depth_conv.conv.bias": (2 * hidden,),
        "mlp.point_conv.conv.weight": (width, hidden, 1, 1),
    }
    if config.qk_norm:
        block |= {f"{a}.{t}_norm.weight": (width,) for a in ("attn", "cross_attn") for t in "qk"}
    top = {
        "x_embedder.proj.weight": (width, 32, 1, 1),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "t_block.1.weight": (6 * width, width),
        "t_block.1.bias": (6 * width,),
        "y_embedder.y_proj.fc1.weight": (width, 2304),
        "y_embedder.y_proj.fc1.bias": (width,),
        "y_embedder.y_proj.fc2.weight": (width, width),
        "y_embedder.y_proj.fc2.bias": (width,),
        "attention_y_norm.weight": (width,),
        "final_layer.linear.weight": (32, width),
        "final_layer.linear.bias": (32,),
        "final_layer.scale_shift_table": (2, width),
    }
    if config.is_sprint:
        embedder = {n: shape for n, shape in top.items() if n.startswith("t_embedder.")}
        top |= {n.replace("t_", "cfg_", 1): shape for n, shape in embedder.items()}
    layers = range(config.depth)
    return top | {f"blocks.{i}.{n}": shape for i in layers for n, shape in block.items()}


PUBLISHED = {
    "Sana_600M_512px.pth": ("sana_600m_512", 591_747_872),
    "Sana_600M_1024px.pth": ("sana_600m_1024", 591_747_872),
    "Sana_1600M_512px_MultiLing.pth": ("sana_1600m_512", 1_604_462_752),
    "Sana_1600M_1024px_BF16.pth": ("sana_1600m_1024", 1_604_462_752),
    "Sana_1600M_2Kpx_BF16.pth": ("sana_1600m_2048", 1_604_462_752),
    "Sana_1600M_4Kpx_BF16.pth": ("sana_1600m_4096", 1_604_462_752),
    "SANA1.5_1.6B_1024px.pth": ("sana1.5_1600m_1024", 1_604_641_952),
    "SANA1.5_4.8B_1024px.pth": ("sana1.5_4800m_1024", 4_721_825_952),
    "Sana_Sprint_0.6B_1024px.pth": ("sana_sprint_600m_1024", 593_501_216),
    "Sana_Sprint_1.6B_1024px.pth": ("sana_sprint_1600m_1024", 1_610_237_472),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(tmp_path, name):
    """From names and shapes alone: the preset, and a parameter for every tensor."""
    preset, count = PUBLISHED[name]
    expected = PRESETS[preset]
    shapes = table(expected)
    assert sum(map(math.prod, shapes.values())) == count
    # One number stands for the whole of a tensor, in the file too.
    zero = torch.zeros(())
    contents = {n: zero.expand(shape) for n, shape in shapes.items()}
    torch.save(contents, tmp_path / name)
    config, reader = open_checkpoint(tmp_path / name)
    assert config == expected
    assert {n: reader.shape(n) for n in reader} == shapes
    ours = param_shapes(config)
    entries = list(dit_entries(config))
    assert sorted(entry.path for entry in entries) == sorted(ours)
    theirs = {}
    for entry in entries:
        theirs |= entry.their_shapes(ours[entry.path].shape)
    assert theirs == shapes


def test_native_size(tmp_path):
    """The caller's word, then the stored positions, then the file's name, then 1024."""
    module, _ = small()
    contents = official(module)

    def native(name, positions=None, **kwargs):
        buffer = {} if positions is None else {"pos_embed": torch.zeros(1, positions, 64)}
        torch.save({**contents, **buffer}, tmp_path / name)
        config, _ = open_checkpoint(tmp_path / name, cross_heads=2, **kwargs)
        return config.sample_size, config.interpolation_scale

    assert native("mine.pth") == (32, None)
    assert native("Sana_512px.pth") == (16, None)
    assert native("Sana_1600M_2048px.pth") == (64, 1.0)
    assert native("Sana_512px.pth", positions=64**2) == (64, 1.0)
    assert native("Sana_512px.pth", positions=128**2) == (128, 2.0)
    assert native("Sana_512px.pth", positions=60) == (16, None)  # no square
    assert native("Sana_512px.pth", positions=64**2, image_size=1024) == (32, None)
    assert native("Sana_512px.pth", image_size=4096) == (128, 2.0)
    for image_size in (1000, 0, -32):
        with pytest.raises(UserError, match=f"image_size {image_size} is no multiple of 32"):
            native("mine.pth", image_size=image_size)


def without(name):
    return lambda tensors: tensors.pop(name)


def added(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def poison(tensors):
    tensors["blocks.1.attn.qkv.weight"][5, 6] = math.nan


@pytest.mark.parametrize(
    "change, words",
    [
        (added("cfg_embedder.mlp.0.weight", 64, 256), "missing cfg_embedder.mlp.0.bias"),
        (added("controlnet.0.copied_block.attn.proj.bias", 64), "Sana ControlNet"),
        (added("blocks.0.mlp.t_conv.weight", 64, 64, 3, 1), "Sana Video"),
        (added("blocks.0.flash_attn_additional.qkv.bias", 192), "Sana Video"),
        (added("x_embedder.proj.weight", 64, 8, 1, 2, 2), "Sana Video"),
        # Softmax attention, not linear: its projection has a bias.
        (added("blocks.0.attn.qkv.bias", 192), "unexpected blocks.0.attn.qkv.bias"),
        (added("final_layer.linear.weight", 16, 64), "final_layer.linear.weight is [16, 64]"),
        (added("x_embedder.proj.weight", 64, 8), "no Sana transformer: it has [64, 8] as"),
        (added("x_embedder.proj.weight", 0, 8, 1, 1), "no Sana transformer"),
        (without("x_embedder.proj.weight"), "no Sana transformer: it has no x_embedder"),
        (without("blocks.2.mlp.depth_conv.conv.bias"), "missing blocks.2.mlp.depth_conv.conv.bias"),
        (poison, "blocks.1.attn.qkv.weight holds NaN"),
        (lambda tensors: tensors.clear(), "no Sana transformer"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, words):
    tensors = official(small()[0])
    change(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "Sana_1024px.pth")
    with pytest.raises(UserError) as error:
        load(tmp_path / "Sana_1024px.pth")
    assert words in str(error.value) and "\n" not in str(error.value), error.value
    assert "Sana_1024px.pth" in str(error.value)


def test_teacher_of_sprint_is_known_by_its_name(tmp_path):
    """Its tensors are those of another model, its timesteps are not."""
    module, config = small(sample_size=32, qk_norm="rms_norm_across_heads")
    path = tmp_path / "Sana_Sprint_1.6B_1024px_teacher.pth"
    torch.save(official(module), path)
    expected = dataclasses.replace(config, timestep_scale=0.001)
    assert open_checkpoint(path, cross_heads=2)[0] == expected and not expected.is_sprint


def test_unknown_widths_need_the_number_of_heads(tmp_path):
    path = tmp_path / "Sana_1024px.pth"
    torch.save(official(small()[0]), path)
    for cross_heads in (None, 3, -2):
        with pytest.raises(UserError, match="width 64.*1152 and 2240 only; give --cross_heads"):
            open_checkpoint(path, cross_heads=cross_heads)
    assert open_checkpoint(path, cross_heads=4)[0].cross_heads == 4
