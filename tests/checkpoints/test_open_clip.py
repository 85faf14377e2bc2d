"""The tensors of a CLIP of transformers under the names of OpenAI and open_clip: the same CLIP."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sana_jax.checkpoints import clip, open_clip
from sana_jax.models.clip import CLIPConfig
from sana_jax.runtime.errors import UserError
from tests import toy_clip

TOWER = dict(hidden_size=64, intermediate_size=256, num_attention_heads=1, num_hidden_layers=2)
CONFIG = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 300,
            "width": 64,
            "heads": 1,
            "layers": 2,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"},
}
NAMES = [  # of transformers, and of OpenAI
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
]


def renamed(model) -> dict[str, np.ndarray]:
    theirs = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    found = {
        "visual.proj": theirs.pop("visual_projection.weight").T,
        "text_projection": theirs.pop("text_projection.weight").T,
    }
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, x in theirs.items():
        for mine, other in NAMES:
            name = name.replace(mine, other)
        if "self_attn" in name:  # q, k and v are one matrix
            layer, _, rest = name.partition("self_attn.")
            kind, _, what = rest.partition("_proj.")
            parts.setdefault(f"{layer}attn.in_proj_{what}", {})[kind] = x
        elif "position_ids" not in name:
            found[name] = x
    joined = {name: np.concatenate([x[k] for k in "qkv"]) for name, x in parts.items()}
    return {name: np.ascontiguousarray(x) for name, x in (found | joined).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same CLIP as transformers and as open_clip write it."""
    theirs, own = (tmp_path_factory.mktemp(name) for name in ("transformers", "open_clip"))
    small = dict(vocab_size=300, max_position_embeddings=16, bos_token_id=toy_clip.BEGIN)
    text = TOWER | small | dict(eos_token_id=toy_clip.END)
    vision = TOWER | dict(image_size=32, patch_size=8)
    model = toy_clip.save(theirs, activation="gelu", text=text, vision=vision)
    toy_clip.save_tokenizer(own)
    (own / open_clip.CONFIG).write_text(json.dumps(CONFIG))
    save_file(renamed(model), own / open_clip.WEIGHTS)
    return theirs, own


def test_the_weights_are_those_of_transformers_names(folders):
    theirs, own = map(clip.open_clip, folders)
    assert not own.config.quick_gelu and own.mean == (0.5, 0.4, 0.3) and own.std == (0.2, 0.3, 0.4)
    assert jax.tree.structure(own.params) == jax.tree.structure(theirs.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(*map(np.asarray, (a, b))),
        own.params,
        theirs.params,
    )
    tokens = own.tokenize(["two red circles"], own.tokenizer())
    pixels = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)

    def read(opened):
        params = jax.tree.map(np.asarray, opened.params)
        return jax.jit(opened.module().apply)({"params": params}, pixels, tokens)

    jax.tree.map(np.testing.assert_array_equal, read(own), read(theirs))


def test_the_published_vit_l_14(tmp_path):
    vision = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
    text = dict(context_length=77, vocab_size=49408, width=768, heads=12, layers=12)
    model = dict(embed_dim=768, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    (tmp_path / "c.json").write_text(json.dumps({"model_cfg": model}))
    assert open_clip.read_config(tmp_path / "c.json") == (CLIPConfig(), {})


def changed(*path, to):
    contents = json.loads(json.dumps(CONFIG))
    group = contents
    for name in path[:-1]:
        group = group[name]
    group[path[-1]] = to
    return contents


@pytest.mark.parametrize(
    "contents, words",
    [
        ({}, "'model_cfg' is missing"),
        (changed("model_cfg", "embed_dim", to=0), "embedding 0"),
        (changed("model_cfg", "custom_text", to=True), "custom_text is not supported"),
        (changed("model_cfg", "multimodal_cfg", to={}), "multimodal_cfg is not supported"),
        (changed("model_cfg", "text_cfg", "hf_model_name", to="x"), "hf_model_name is not supp"),
        (changed("model_cfg", "vision_cfg", "layers", to=[3, 4]), "is no CLIP of open_clip"),
        (changed("preprocess_cfg", "mean", to=[1]), "image_mean"),
    ],
)
def test_other_models_are_refused(folders, tmp_path, contents, words):
    (tmp_path / open_clip.WEIGHTS).write_bytes((folders[1] / open_clip.WEIGHTS).read_bytes())
    (tmp_path / open_clip.CONFIG).write_text(json.dumps(contents))
    with pytest.raises(UserError) as error:
        clip.open_clip(tmp_path)
    assert words in str(error.value)


def test_where_both_are_transformers_files_are_read(folders, tmp_path):
    for folder in folders:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert clip.open_clip(tmp_path).mean == clip.MEAN
