"""The tokenizer of our own: known captions, any text, and the same again."""

import random

import pytest

from sana_jax.runtime.errors import UserError
from sana_jax.shapes.captions import captions, prompts
from sana_jax.shapes.scene import scene
from sana_jax.text.prompts import clean_prompt, tokenize
from sana_jax.text.tokenizers import SMALLEST, load_tokenizer, train_tokenizer

CAPTIONS = [said.text for i in range(300) for said in captions(scene((0, i), "train"))]
ROWS = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS, 1024, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_every_caption_round_trips_without_unknown_tokens(tokenizer):
    others = [prompt.text for prompt in prompts(256)]
    for caption in CAPTIONS + others:
        ids = tokenizer.encode(caption.lower())
        assert tokenizer.unk_token_id not in ids and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == clean_prompt(caption)
    held_out = tokenizer.tokenize(others[3].lower())
    assert len(held_out) <= len(others[3].split()) + sum(
        map(others[3].count, ",;:.")
    )  # whole words


def test_the_empty_prompt_is_bos_alone(tokenizer):
    assert tokenizer.encode("") == [tokenizer.bos_token_id]
    tokenized = tokenize(tokenizer, [""], ROWS, None, fixed_width=True)
    assert tokenized.mask.sum() == 1 and tokenized.tokens.shape == (1, ROWS)
    assert set(tokenized.tokens[0, 1:]) == {tokenizer.pad_token_id}


@pytest.mark.parametrize(
    "text", ["😀 a zebra", "一只猫", "e\u0301\u200d", "<0x41>", "\ud800", "\x00"]
)
def test_any_text_is_encoded(tokenizer, text):
    tokenized = tokenize(tokenizer, [text], ROWS, None, fixed_width=True)
    ids = tokenized.tokens[tokenized.mask]
    assert len(ids) > 1 and tokenizer.unk_token_id not in ids
    if text not in ("\ud800", "\x00"):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_padding_is_not_bos_and_words_are_whole(tokenizer):
    assert tokenizer.pad_token_id == 0 != tokenizer.bos_token_id
    assert tokenizer.tokenize("a red circle, above") == ["▁a", "▁red", "▁circle", ",", "▁above"]
    assert tokenizer.tokenize("a\n  red") == ["▁a", "▁red"]


def test_training_is_deterministic(folder, tmp_path):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    train_tokenizer((caption.upper() for caption in shuffled), 1024, tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_size_is_a_limit(tmp_path):
    small = train_tokenizer(CAPTIONS, SMALLEST + 20, tmp_path)
    assert len(small) == SMALLEST + 20 == len(load_tokenizer(tmp_path))
    caption = clean_prompt(CAPTIONS[0])
    assert small.decode(small.encode(caption), skip_special_tokens=True) == caption
    with pytest.raises(UserError, match=f"letters and bytes alone are {SMALLEST}"):
        train_tokenizer(CAPTIONS, SMALLEST - 1, tmp_path)
