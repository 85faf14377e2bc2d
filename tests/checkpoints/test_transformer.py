"""Transformers that stand alone, under both projects' names, with prefixes and without."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_jax.checkpoints.transformer import open_transformer
from sana_jax.runtime.errors import UserError
from tests import toy
from tests.checkpoints.test_nvlabs import official, small

PREFIXES = ["", "model.", "transformer.", "model.diffusion_model.", "module._orig_mod."]


def theirs(module, names: str) -> dict[str, torch.Tensor]:
    tensors = official(module) if names == "nvlabs" else module.state_dict()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def assert_opens(source, module, config, layout, **kwargs):
    found = open_transformer(str(source), **kwargs)
    assert found.config == config
    assert found.provenance["layout"] == layout
    jax.tree.map(np.testing.assert_array_equal, found.params, toy.params(module, config))
    return found


@pytest.fixture(scope="module", params=[dict(), dict(qk_norm="rms_norm_across_heads")])
def made(request):
    return small(sample_size=32, **request.param)


@pytest.mark.parametrize("names", ["nvlabs", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_safetensors_file_of_any_one_prefix(made, tmp_path, names, prefix):
    path = tmp_path / "fine_1024px.safetensors"
    save_file({prefix + name: tensor for name, tensor in theirs(made[0], names).items()}, path)
    found = assert_opens(path, *made, names, cross_heads=2)
    assert found.provenance["source"] == path.name


def test_a_pth_file_of_a_wrapped_network(made, tmp_path):
    path = tmp_path / "fine_1024px.pth"
    state = {f"module.{name}": tensor for name, tensor in official(made[0]).items()}
    torch.save({"state_dict": state}, path)
    assert_opens(path, *made, "nvlabs", cross_heads=2)


@pytest.mark.parametrize("inner", ["transformer", "."])
def test_a_folder_as_fine_tunes_leave_it(tmp_path, inner):
    """Its config.json says what no shape does, for a file of it too."""
    module, config = toy.transformer(sample_size=64, interpolation_scale=1.0)
    folder = tmp_path / "tune"
    module.save_pretrained(folder / inner)
    assert_opens(folder, module, config, "diffusers")
    found = assert_opens(folder / inner, module, config, "diffusers")
    assert found.provenance["source"] == "tune"
    weights = "diffusion_pytorch_model.safetensors"
    assert_opens(folder / inner / weights, module, config, "diffusers")


def save(path, change, names="diffusers"):
    tensors = theirs(small()[0], names)
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.update({"vae.x": torch.zeros(1)}), "unexpected vae.x$"),
        (
            lambda t: t.update({"model.proj_out.bias": t.pop("proj_out.bias")}),
            "missing proj_out.bias; unexpected model.proj_out.bias",
        ),
        (lambda t: t.pop("patch_embed.proj.weight"), "neither x_embedder.*nor patch_embed.*, but"),
        (lambda t: t.clear(), "but nothing"),
        (
            lambda t: t.update({"time_embed.guidance_embedder.linear_1.bias": torch.zeros(1)}),
            "missing time_embed.guidance_embedder.linear_1.weight",
        ),
    ],
)
def test_what_does_not_map_one_to_one_is_named(tmp_path, change, words):
    path = save(tmp_path / "tune.safetensors", change)
    with pytest.raises(UserError, match=f"tune.safetensors.*{words}"):
        open_transformer(str(path), cross_heads=2)


def test_what_is_no_transformer_alone_is_refused(tmp_path):
    path = save(tmp_path / "tune.safetensors", lambda tensors: None)
    with pytest.raises(UserError, match="width 64.*give --cross_heads"):
        open_transformer(str(path))
    with pytest.raises(UserError, match="--ema is for a .pth file"):
        open_transformer(str(path), use_ema=True)
    with pytest.raises(UserError, match="missing.safetensors is missing"):
        open_transformer(str(tmp_path / "missing.safetensors"))
    folder = tmp_path / "transformer"
    toy.transformer()[0].save_pretrained(folder)
    with pytest.raises(UserError, match="--image_size is for a file"):
        open_transformer(str(folder), image_size=512)
    with pytest.raises(UserError, match="no revision 'main'"):
        open_transformer(str(folder), revision="main")
    shutil.copy(folder / "config.json", folder / "model_index.json")
    with pytest.raises(UserError, match="is a whole checkpoint: leave --rest out"):
        open_transformer(str(folder))
    (folder / "model_index.json").unlink()
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC"}))
    with pytest.raises(UserError, match="config.json.*AutoencoderDC"):
        open_transformer(str(folder))
