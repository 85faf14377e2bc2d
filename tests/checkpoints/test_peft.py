"""LoRA files, against peft and diffusers in float32."""

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors import safe_open

from sana_jax.checkpoints.components import abstract_params
from sana_jax.checkpoints.peft import METADATA, modules, write_adapter
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
    from diffusers import SanaPipeline

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
