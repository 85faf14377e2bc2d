"""LoRA files, against peft and diffusers in float32."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from diffusers import SanaPipeline
from flax import linen as nn
from flax import traverse_util
from safetensors import safe_open

from sana_jax.checkpoints.components import abstract_params
from sana_jax.checkpoints.peft import METADATA, modules, read_adapter, write_adapter
from sana_jax.lora.adapter import attach, new_adapter, sites
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import PRESETS, SanaTransformer
from sana_jax.runtime.errors import UserError
from tests import toy
from tests.models.test_dit import apply, inputs, reference

TIMESTEP = 562
KINDS = {
    "plain": {},
    "of 1.5, with biases": dict(qk_norm="rms_norm_across_heads", attention_bias=True),
    "patches of 2": dict(patch_size=2),
}


@pytest.fixture(params=KINDS)
def theirs(request):
    return toy.transformer(**KINDS[request.param])


def random_adapter(config, targets=(".*",), rank=4, seed=1):
    """An adapter that changes the network, unlike a new one."""
    lora = LoraConfig(rank, targets=targets)
    made = nn.unbox(new_adapter(abstract_params(config), lora, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    # The update is half as large as the weights.
    return jax.tree.map(
        lambda x: 0.7 * rng.standard_normal(x.shape, np.float32) / x.shape[-2] ** 0.5, made
    )


def velocity(config, params):
    latents, caption, mask = inputs(config)
    times = np.array([TIMESTEP], np.float32)
    return apply(SanaTransformer(config), params, latents, times, caption, mask)


def velocity_of(module, config):
    latents, caption, mask = inputs(config)
    return reference(module, latents, TIMESTEP, caption, mask)


def load(module, file, **kwargs):
    """Gives a LoRA file to diffusers, as its pipelines do."""
    state, metadata = SanaPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    SanaPipeline.load_lora_into_transformer(state, module, metadata=metadata, **kwargs)


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_diffusers_computes_what_is_written(theirs, alpha, tmp_path):
    module, config = theirs
    params, adapter = toy.params(module, config), random_adapter(config)
    file = tmp_path / "new" / "pytorch_lora_weights.safetensors"
    write_adapter(file, adapter, config, alpha)
    load(module, file)
    ours = velocity(config, attach(params, [(adapter, 1 if alpha is None else alpha / 4)]))
    toy.assert_close(ours, velocity_of(module, config), 1e-5)
    with pytest.raises(AssertionError):
        toy.assert_close(ours, velocity(config, params), 1e-2)


def test_a_site_has_an_alpha_by_its_scale(tmp_path):
    module, config = toy.transformer()
    params, adapter = toy.params(module, config), random_adapter(config)
    flat = traverse_util.flatten_dict(adapter, sep="/")
    flat["blocks/attention/q/scale"] = np.array([0.5, 2, 1.25])
    flat["proj_out/scale"] = np.array(3.0)
    adapter = traverse_util.unflatten_dict(flat, sep="/")
    write_adapter(tmp_path / "lora.safetensors", adapter, config)
    load(module, tmp_path / "lora.safetensors")
    ours = velocity(config, attach(params, [(adapter, 1)]))
    toy.assert_close(ours, velocity_of(module, config), 1e-5)


def test_the_header_says_what_a_file_is(tmp_path):
    _, config = toy.transformer()
    file = tmp_path / "lora.safetensors"
    write_adapter(file, random_adapter(config), config, alpha=8, metadata={"steps": 500})
    with safe_open(file, framework="np") as opened:
        header = opened.metadata()
    told = json.loads(header[METADATA])
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (4, 8)
    assert told["transformer.rank_pattern"] == told["transformer.alpha_pattern"] == {}
    assert (header["steps"], header["absent_alpha"]) == ("500", "rank")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_site_is_a_module_and_every_module_a_site(preset):
    config, found = PRESETS[preset], {}
    for module in modules(PRESETS[preset]).values():
        found.setdefault(module.site, []).append(module.layer)
    known = sites(abstract_params(config))
    assert found.keys() == known.keys()
    for site, layers in found.items():
        assert layers == ([*range(config.depth)] if site.startswith("blocks/") else [()]), site


def test_what_the_layout_has_no_name_for_is_not_written(tmp_path):
    _, config = toy.transformer()
    site = {"a": np.zeros((3, 64, 4)), "b": np.zeros((3, 4, 64))}
    with pytest.raises(UserError, match="blocks/elsewhere"):
        write_adapter(tmp_path / "lora.safetensors", {"blocks": {"elsewhere": site}}, config)
    assert not [*tmp_path.iterdir()]


# peft's side: its own module names, ranks and alphas.
TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.conv_inverted", "ff.conv_point", "patch_embed.proj"),
    *("caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    *("timestep_embedder.linear_1", "timestep_embedder.linear_2", "time_embed.linear"),
]
PATTERNS = dict(
    # The first pattern that matches counts, so that the order is part of the meaning.
    rank_pattern={"to_q": 6, r"transformer_blocks\.1\..*": 2, "ff.conv_point": 5, "proj_out": 1},
    alpha_pattern={r"attn2\.to_[qk]": 3, "to_k": 9.5, "conv_inverted": 1, "^proj_out": 2},
)
CONFIGS = {
    "alpha is the rank": dict(r=4, lora_alpha=4),
    "alpha is another": dict(r=4, lora_alpha=7),
    "patterns": dict(r=4, lora_alpha=6, **PATTERNS),
    "rank-stabilised": dict(r=4, lora_alpha=3, use_rslora=True, rank_pattern={"to_v": 2}),
    "some layers": dict(r=3, lora_alpha=6, target_modules=r"transformer_blocks\.[02].*to_[qv]"),
}


def add_adapter(module, name="default", seed=5, **fields):
    """Gives a torch module a random LoRA of peft's."""
    module.add_adapter(peft.LoraConfig(**{"target_modules": TARGETS, **fields}), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in module.named_parameters():
            if f".lora_A.{name}" in key or f".lora_B.{name}" in key:
                sides = tensor[0].numel()
                tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator) / sides**0.5)


def save(module, folder, name="default"):
    """Writes the LoRA as diffusers' training script does; returns the file."""
    layers = peft.get_peft_model_state_dict(module, adapter_name=name)
    told = {k: sorted(x) if isinstance(x, set) else x for k, x in fields_of(module, name).items()}
    SanaPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=told
    )
    return folder / "pytorch_lora_weights.safetensors"


def fields_of(module, name="default"):
    return module.peft_config[name].to_dict()


@pytest.mark.parametrize(
    "kind, fields",
    sorted({("plain", name) for name in CONFIGS} | {(kind, "patterns") for kind in KINDS}),
)
def test_the_velocity_is_that_of_a_file_of_peft(kind, fields, tmp_path):
    module, config = toy.transformer(**KINDS[kind])
    params = toy.params(module, config)
    add_adapter(module, **CONFIGS[fields])
    file = tmp_path / "lora.safetensors"
    save(module, tmp_path).rename(file)
    if fields == "patterns":  # peft sorts them: what the file says is another LoRA by now
        rewrite(file, lambda told: told | {f"transformer.{k}": v for k, v in PATTERNS.items()})
    attached = attach(params, [(read_adapter(file, config), 1)])
    toy.assert_close(velocity(config, attached), velocity_of(module, config), 1e-5)
    with pytest.raises(AssertionError):
        toy.assert_close(velocity(config, params), velocity_of(module, config), 1e-2)


def rewrite(file, change):
    """Changes the metadata of a file."""
    with safe_open(file, framework="np") as opened:
        header, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}
    header[METADATA] = json.dumps(change(json.loads(header[METADATA])))
    safetensors.numpy.save_file(tensors, file, header)
