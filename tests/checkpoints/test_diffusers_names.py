"""The tables of tensor names, against the networks of diffusers and transformers at full size."""

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from transformers import Gemma2Config as TheirGemma2Config
from transformers import Gemma2Model

from sana_jax.checkpoints.components import param_shapes
from sana_jax.checkpoints.diffusers import IGNORED
from sana_jax.checkpoints.diffusers_configs import config_json
from sana_jax.checkpoints.diffusers_names import entries
from sana_jax.models import dc_ae_config, dit
from sana_jax.models.gemma2 import Gemma2Config

NETWORKS = {
    "sana_600m_512": (SanaTransformer2DModel, dit.PRESETS["sana_600m_512"]),
    "sana1.5_1600m_1024": (SanaTransformer2DModel, dit.PRESETS["sana1.5_1600m_1024"]),
    "sana_sprint_600m_1024": (SanaTransformer2DModel, dit.PRESETS["sana_sprint_600m_1024"]),
    **{name: (AutoencoderDC, config) for name, config in dc_ae_config.PRESETS.items()},
    "gemma2": (Gemma2Model, Gemma2Config()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_has_its_parameter(name):
    kind, config = NETWORKS[name]
    with torch.device("meta"):
        contents = config_json(config)
        is_text = kind is Gemma2Model
        module = kind(TheirGemma2Config(**contents)) if is_text else kind.from_config(contents)
    theirs = {n: tuple(t.shape) for n, t in module.state_dict().items() if not n.endswith(IGNORED)}
    shapes, table = param_shapes(config), entries(config)
    assert sorted(entry.path for entry in table) == sorted(shapes)
    found = {}
    for entry in table:
        tensors = entry.their_shapes(shapes[entry.path].shape)
        assert not found.keys() & tensors.keys()
        found |= tensors
    assert found == theirs
