"""A folder of CLIP: its config, its tokenizer, and what is refused."""

import json

import numpy as np
import pytest

from sana_jax.checkpoints import clip
from sana_jax.models.clip import CLIPConfig, Tower
from sana_jax.runtime.errors import UserError
from tests import toy_clip

VIT_B_32 = CLIPConfig(
    embedding=512,
    vision=Tower(768, 12, 12, 3072),
    patch_size=32,
    text=Tower(512, 12, 8, 2048),
)
VIT_L_14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
VIT_L_14_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    toy_clip.save(path)
    return path


def read(tmp_path, **config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "clip"} | config))
    return clip.read_config(path)


def test_published_configs(tmp_path):
    """The old ones name what differs from the defaults, twice; 2 is the end that they name."""
    text, vision = {"eos_token_id": 2}, {"patch_size": 32}
    assert read(tmp_path, text_config=text, vision_config=vision) == VIT_B_32
    text = {"text_config": text, "text_config_dict": VIT_L_14_TEXT | {"dropout": None}}
    vision = {"vision_config": {}, "vision_config_dict": VIT_L_14_VISION}
    assert read(tmp_path, projection_dim=768, **text, **vision) == CLIPConfig()
    large = VIT_L_14_VISION | {"image_size": 336}
    found = read(tmp_path, projection_dim=768, vision_config=large, text_config=VIT_L_14_TEXT)
    assert (found.image_size, found.patches, found.end_token) == (336, 576, 49407)


def test_gelu_is_that_of_open_clip(tmp_path):
    group = {"hidden_act": "gelu"}
    assert not read(tmp_path, text_config=group, vision_config=group).quick_gelu


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "siglip"}, "model_type 'siglip', where 'clip' is needed"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is gelu and quick_gelu, where"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is not 1e-5"),
        ({"vision_config": {"patch_size": 15}}, "patch_size 15 does not divide image_size 224"),
        ({"vision_config": {"num_attention_heads": 7}}, "heads 7 do not divide"),
        ({"projection_dim": None}, "embedding None"),
    ],
)
def test_other_configs_are_refused(tmp_path, config, words):
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, **config)
    assert "\n" not in str(error.value) and "config.json" in str(error.value)


def test_texts_are_cut_before_their_end(folder):
    opened = clip.open_clip(folder)
    tokens = opened.tokenize(["a cat", "ba " * 40], opened.tokenizer())
    assert tokens.shape == (2, 16) and tokens.dtype == np.int32
    assert (tokens[:, 0] == toy_clip.BEGIN).all()
    ends = np.argmax(tokens == toy_clip.END, axis=1)
    assert ends[1] == 15 and 2 < ends[0] < 15 and (tokens[0, ends[0] :] == toy_clip.END).all()


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("vocab.json", None, "has no tokenizer.json and no vocab.json"),
        ("vocab.json", "[]", "holds no tokenizer that transformers reads"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", "junk", "is not a whole safetensors file"),
        ("config.json", None, "config.json is missing"),
        ("preprocessor_config.json", '{"image_mean": [1, 2]}', "image_mean .* is not three"),
        ("preprocessor_config.json", '{"image_std": [1, 2, 0]}', "image_std .* is not three"),
    ],
)
def test_other_folders_are_refused(folder, tmp_path, file, content, words):
    for path in folder.iterdir():
        if path.name != file:
            (tmp_path / path.name).symlink_to(path)
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        clip.open_clip(tmp_path).tokenizer()
    assert "\n" not in str(error.value)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no folder: give one with CLIP"):
        clip.open_clip(tmp_path / "none")
