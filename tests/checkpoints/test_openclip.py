"""OpenCLIP's own files: the same network as transformers' of the same weights."""

import json

import jax
import numpy as np
import pytest
import torch

from sana_jax import sharding
from sana_jax.checkpoints import openclip
from sana_jax.checkpoints.clip import open_clip
from sana_jax.models.clip import CLIPConfig, Tower
from sana_jax.runtime.errors import UserError
from tests import toy_clip
from tests.toy import assert_close

# As published with laion2b_s34b_b79k and laion2b_s32b_b82k.
VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
    },
}
VIT_L_14 = VIT_B_32 | {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": VIT_B_32["text_cfg"] | {"width": 768, "heads": 12},
}


def read(tmp_path, model, **pixels):
    path = tmp_path / openclip.CONFIG
    path.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    return openclip.read_config(path)


def test_published_configs(tmp_path):
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    found, said = read(tmp_path, VIT_B_32, **pixels)
    text, vision = Tower(512, 12, 8, 2048), Tower(768, 12, 12, 3072)
    assert found == CLIPConfig(512, vision, 224, 32, text, quick_gelu=False)
    assert said == pixels
    assert read(tmp_path, VIT_L_14)[0] == CLIPConfig(quick_gelu=False)
    assert read(tmp_path, VIT_L_14 | {"quick_gelu": True})[0] == CLIPConfig()
    old = VIT_B_32 | {"text_cfg": VIT_B_32["text_cfg"] | {"hf_model_name": None}}
    assert read(tmp_path, old)[0] == found


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_are_those_of_transformers(tmp_path, activation):
    model = toy_clip.save(tmp_path, activation)
    toy_clip.as_openclip(tmp_path, activation == "quick_gelu")
    opened = open_clip(tmp_path)
    assert opened.mean == (0.5, 0.4, 0.3) and opened.std == (0.2, 0.3, 0.4)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    tokens = opened.tokenize(["a cat", "ba be bi"], opened.tokenizer())
    with torch.no_grad():
        theirs = [
            model.get_image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
            model.get_text_features(torch.from_numpy(tokens).long()),
        ]
    params = {"params": opened.place(sharding.make_mesh(devices=jax.devices()[:1]))}
    ours = jax.jit(opened.module().apply)(params, pixels, tokens)
    for found, expected, name in zip(ours, theirs, ("image", "text"), strict=True):
        expected = getattr(expected, "pooler_output", expected)
        assert_close(found, np.asarray(expected), 1e-5, name)


def test_the_hash_is_of_these_files(tmp_path):
    toy_clip.save(tmp_path)
    before = open_clip(tmp_path).sha256()
    toy_clip.as_openclip(tmp_path)
    after = open_clip(tmp_path).sha256()
    path = tmp_path / openclip.CONFIG
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert len({before, after, open_clip(tmp_path).sha256()}) == 3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"custom_text": True}, "model_cfg has custom_text, of a model that is not supported"),
        ({"vision_cfg": {"timm_model_name": "x"}}, "vision_cfg has timm_model_name"),
        ({"text_cfg": {"no_causal_mask": True}}, "text_cfg has no_causal_mask"),
        ({"vision_cfg": {"pool_type": "avg"}}, "vision_cfg has pool_type"),
        ({"text_cfg": [1]}, "text_cfg is no object"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "depth"),
        ({"vision_cfg": {"head_width": 0}}, "division"),
        ({"embed_dim": None}, "it has no 'embed_dim'"),
        ({"vision_cfg": {"mlp_ratio": "4"}}, "open_clip_config.json"),
    ],
)
def test_other_models_are_refused(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, VIT_B_32 | changes)
    assert "\n" not in str(error.value) and "open_clip_config.json" in str(error.value)


def test_what_is_usual_may_be_said(tmp_path):
    vision = VIT_B_32["vision_cfg"] | {"pool_type": "tok", "output_tokens": False}
    text = VIT_B_32["text_cfg"] | {"pool_type": "argmax", "proj_type": "linear"}
    said = read(tmp_path, VIT_B_32 | {"vision_cfg": vision, "text_cfg": text})
    assert said == read(tmp_path, VIT_B_32)


def test_other_pixels_are_refused(tmp_path):
    with pytest.raises(UserError, match="interpolation 'bilinear', where bicubic is supported"):
        read(tmp_path, VIT_B_32, interpolation="bilinear")
    toy_clip.save(tmp_path)
    toy_clip.as_openclip(tmp_path)
    path = tmp_path / openclip.CONFIG
    path.write_text(path.read_text().replace('"std": [0.2,', '"std": [0,'))
    with pytest.raises(UserError, match="std .* is not three numbers"):
        open_clip(tmp_path)
