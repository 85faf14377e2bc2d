"""Small random CLIPs as transformers writes them, with a tokenizer of their own."""

import json
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel

from tests.toy import randomise

BEGIN, END = 298, 299  # of 300 tokens
TOWER = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)
VIT_L_14 = {
    "text": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        vocab_size=49408,
        max_position_embeddings=77,
        eos_token_id=49407,
    ),
    "vision": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        image_size=224,
        patch_size=14,
    ),
    "width": 768,
}


def save(
    folder: Path, activation: str = "quick_gelu", text=None, vision=None, width: int = 24
) -> torch.nn.Module:
    """Writes a folder and returns the model in it."""
    small = dict(vocab_size=300, max_position_embeddings=16, eos_token_id=END, bos_token_id=BEGIN)
    text = text or TOWER | small
    vision = vision or TOWER | dict(image_size=32, patch_size=8, hidden_size=32)
    config = CLIPConfig(
        text_config=text | {"hidden_act": activation},
        vision_config=vision | {"hidden_act": activation},
        projection_dim=width,
    )
    model = randomise(CLIPModel(config))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """Writes one of bytes and a few words, with OpenAI's special tokens, of 300 in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [f"{a} {b}</w>" for a in string.ascii_lowercase for b in "aeiou"]
    merges = pairs[: 298 - len(letters) - len(string.ascii_lowercase)]
    names = [*letters, *(f"{c}</w>" for c in string.ascii_lowercase)]
    names += [pair.replace(" ", "") for pair in merges]
    vocabulary = {name: i for i, name in enumerate(names)}
    vocabulary |= {"<|startoftext|>": BEGIN, "<|endoftext|>": END}
    assert len(vocabulary) == 300
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def as_openclip(folder: Path, quick_gelu: bool = False) -> None:
    """Turns a folder of transformers' into one with OpenCLIP's files and names."""
    theirs = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    fixed = {
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    ours = {name: theirs[old] for name, old in fixed.items()}
    ours["visual.proj"] = theirs["visual_projection.weight"].T.contiguous()
    ours["text_projection"] = theirs["text_projection.weight"].T.contiguous()
    towers = ("visual.", "vision_model", vision), ("", "text_model", text)
    for end in "weight", "bias":
        for new, old in (
            ("visual.ln_pre", "vision_model.pre_layrnorm"),
            ("ln_final", "text_model.final_layer_norm"),
            ("visual.ln_post", "vision_model.post_layernorm"),
        ):
            ours[f"{new}.{end}"] = theirs[f"{old}.{end}"]
        for prefix, tower, group in towers:
            for i in range(group["num_hidden_layers"]):
                block, layer = f"{prefix}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
                parts = [theirs[f"{layer}.self_attn.{t}_proj.{end}"] for t in "qkv"]
                ours[f"{block}.attn.in_proj_{end}"] = torch.cat(parts)
                for new, old in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                ):
                    ours[f"{block}.{new}.{end}"] = theirs[f"{layer}.{old}.{end}"]
    model = {
        "embed_dim": config["projection_dim"],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
    } | ({"quick_gelu": True} if quick_gelu else {})
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    save_file(ours, folder / "open_clip_model.safetensors")
    about = {
        "model_cfg": model,
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(about))
