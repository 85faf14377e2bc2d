"""CLIP against transformers: both towers, and the places where a text ends."""

import jax
import numpy as np
import pytest
import torch

from sana_jax import sharding
from sana_jax.checkpoints.clip import open_clip
from sana_jax.models.clip import CLIPConfig, Tower, unit
from tests import toy_clip
from tests.toy import assert_close


def inputs(config, end):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, config.image_size, config.image_size, 3)).astype(np.float32)
    tokens = rng.integers(3, end, (4, config.context)).astype(np.int32)
    for row, place in enumerate((config.context - 1, 5, 1, 9)):
        tokens[row, place] = end
        tokens[row, place:] = end if row % 2 else tokens[row, place:]  # padded by ends, or not
    return pixels, tokens


def theirs(model, pixels, tokens):
    with torch.no_grad():
        image = model.get_image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        text = model.get_text_features(torch.from_numpy(tokens).long())
    return [np.asarray(getattr(x, "pooler_output", x)) for x in (image, text)]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_features_are_those_of_transformers(tmp_path, activation, fsdp):
    model = toy_clip.save(tmp_path, activation)
    opened = open_clip(tmp_path)
    pixels, tokens = inputs(opened.config, toy_clip.END)
    mesh = sharding.make_mesh(fsdp=fsdp)
    params, module = opened.place(mesh), opened.module()
    with jax.set_mesh(mesh):
        ours = jax.jit(module.apply)({"params": params}, pixels, tokens)
    for found, expected, name in zip(
        ours, theirs(model, pixels, tokens), ("image", "text"), strict=True
    ):
        assert_close(found, expected, 1e-5, name)
    np.testing.assert_allclose(np.linalg.norm(unit(ours[0]), axis=-1), 1, rtol=1e-6)


@pytest.mark.slow
def test_features_at_full_size(tmp_path):
    """ViT-L/14: 428 M parameters, random."""
    model = toy_clip.save(tmp_path, **toy_clip.VIT_L_14)
    opened = open_clip(tmp_path)
    assert opened.config == CLIPConfig(end_token=49407)
    pixels, tokens = inputs(opened.config, 49407)
    mesh = sharding.make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        params = {"params": opened.place(mesh)}
        ours = jax.jit(opened.module().apply)(params, pixels, tokens)
    for found, expected, name in zip(
        ours, theirs(model, pixels, tokens), ("image", "text"), strict=True
    ):
        assert_close(found, expected, 1e-5, name)
    scores = [100 * unit(x[:3]) @ unit(y[:3]).T for x, y in (ours, theirs(model, pixels, tokens))]
    assert np.abs(scores[0] - scores[1]).max() < 1e-4


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(image_size=225), "patch_size 14 does not divide image_size 225"),
        (dict(embedding=0), "embedding 0 is not"),
        (dict(vocab_size="many"), "vocab_size 'many' is not"),
    ],
)
def test_impossible_sizes_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CLIPConfig(**changes)
    with pytest.raises(ValueError, match="heads 7 do not divide the width 64"):
        Tower(64, 2, 7, 128)
