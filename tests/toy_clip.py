"""Small random CLIPs as transformers writes them, with a tokenizer of their own."""

import json
import string
from pathlib import Path

import torch
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
