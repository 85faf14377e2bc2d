"""Tokenizers: our own, and those of folders, whose tokens follow from the text alone."""

import json
import logging
import random
import sys

import pytest

from sana_jax.runtime.errors import UserError
from sana_jax.shapes.captions import captions, prompts
from sana_jax.shapes.scene import scene
from sana_jax.text.prompts import clean_prompt, tokenize
from sana_jax.text.tokenizers import (
    SMALLEST,
    load_tokenizer,
    save_tokenizer,
    toy_tokenizer,
    train_tokenizer,
    vocabulary_size,
)

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


TEXTS = ["", "a red circle above a blue square", "一只猫 <pad> zebra"]


def edit(path, **changes):
    """Sets keys of a JSON object; `...` removes one."""
    contents = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in contents.items() if v is not ...}))


@pytest.fixture
def toy_folder(tmp_path):
    save_tokenizer(toy_tokenizer(), tmp_path)
    return tmp_path


# What transformers 4 and 5 write; Gemma's becomes like this from a tokenizer.model, too.
@pytest.mark.parametrize("name", ["GemmaTokenizer", "GemmaTokenizerFast", "TokenizersBackend", ...])
@pytest.mark.parametrize("said", [..., True])
@pytest.mark.parametrize("kept", [True, False], ids=["in the file", "not in the file"])
def test_bos_comes_first_however_a_tokenizer_arrives(toy_folder, name, said, kept):
    edit(toy_folder / "tokenizer_config.json", tokenizer_class=name, add_bos_token=said)
    if not kept:
        edit(toy_folder / "tokenizer.json", post_processor=None)
    loaded = load_tokenizer(toy_folder)
    assert loaded(TEXTS)["input_ids"] == toy_tokenizer()(TEXTS)["input_ids"]
    save_tokenizer(loaded, toy_folder / "again")
    assert load_tokenizer(toy_folder / "again")(TEXTS) == loaded(TEXTS)


@pytest.mark.parametrize("name", ["GemmaTokenizer", "TokenizersBackend"])
def test_a_tokenizer_that_is_told_to_leave_bos_out_is_refused(toy_folder, name):
    edit(toy_folder / "tokenizer_config.json", tokenizer_class=name, add_bos_token=False)
    edit(toy_folder / "tokenizer.json", post_processor=None)
    with pytest.raises(UserError, match="tokenizer_config.json has add_bos_token false.*to true"):
        load_tokenizer(toy_folder)


def test_a_tokenizer_without_a_bos_token_is_refused(toy_folder):
    edit(toy_folder / "tokenizer_config.json", bos_token=...)
    edit(toy_folder / "tokenizer.json", post_processor=None)
    with pytest.raises(UserError, match="names no bos_token"):
        load_tokenizer(toy_folder)


def test_dropout_is_switched_off_with_a_warning(toy_folder, caplog):
    model = json.loads((toy_folder / "tokenizer.json").read_text())["model"]
    edit(toy_folder / "tokenizer.json", model={**model, "dropout": 0.5})
    loaded = load_tokenizer(toy_folder)
    expected = toy_tokenizer()(TEXTS)["input_ids"]
    assert all(loaded(TEXTS)["input_ids"] == expected for _ in range(20))
    assert "dropout 0.5 is switched off" in caplog.text


@pytest.mark.parametrize("direction", ["Left", "Right"])
def test_cutting_and_padding_of_a_file_change_nothing(toy_folder, direction):
    edit(
        toy_folder / "tokenizer.json",
        truncation={
            "direction": direction,
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 2,
        },
        padding={
            "strategy": {"Fixed": 8},
            "direction": direction,
            "pad_to_multiple_of": 8,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<eos>",
        },
    )
    edit(toy_folder / "tokenizer_config.json", truncation_side=direction.lower())
    loaded, toy = load_tokenizer(toy_folder), toy_tokenizer()
    assert loaded.backend_tokenizer.encode(TEXTS[1]).ids == toy.encode(TEXTS[1])
    for instruction in None, "draw: ":
        found, expected = (tokenize(t, TEXTS, 6, instruction) for t in (loaded, toy))
        assert found.prefix == expected.prefix
        assert found.tokens.tolist() == expected.tokens.tolist()


def test_the_last_call_leaves_nothing_in_a_file(toy_folder):
    before = (toy_folder / "tokenizer.json").read_bytes()
    loaded = load_tokenizer(toy_folder)
    tokenize(loaded, TEXTS, 3, None)
    save_tokenizer(loaded, toy_folder)
    assert (toy_folder / "tokenizer.json").read_bytes() == before


def test_the_vocabulary_reaches_to_the_largest_id(toy_folder):
    assert vocabulary_size(toy_tokenizer()) == len(toy_tokenizer())
    model = json.loads((toy_folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["▁cat"] = 5000
    edit(toy_folder / "tokenizer.json", model=model)
    assert vocabulary_size(load_tokenizer(toy_folder)) == 5001


def test_a_tokenizer_of_another_library_is_refused(toy_folder):
    edit(toy_folder / "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")
    with pytest.raises(UserError, match="ByT5Tokenizer is not one of the library `tokenizers`"):
        load_tokenizer(toy_folder)


@pytest.mark.parametrize("prefix", ["é", "\\u00e9"])
def test_a_prefix_that_is_no_ascii_is_refused(tmp_path, prefix):
    text = f'{{"model": {{"continuing_subword_prefix": "{prefix}"}}}}'
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="continuing_subword_prefix is not plain ASCII"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_pointer_in_place_of_a_file_is_named(toy_folder, name):
    (toy_folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=f"{name} is a git-LFS pointer.*git lfs pull"):
        load_tokenizer(toy_folder)


@pytest.mark.parametrize(
    "package, module", [("sentencepiece",) * 2, ("protobuf", "google.protobuf")]
)
def test_a_tokenizer_model_says_what_it_needs(tmp_path, monkeypatch, package, module):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for other in "sentencepiece", "google.protobuf":
        monkeypatch.setitem(sys.modules, other, None if other == module else logging)
    with pytest.raises(UserError, match=f"tokenizer.model needs {package}.*pip install {package}"):
        load_tokenizer(tmp_path)


class PanicException(BaseException):
    """As pyo3 names what its native code raises; it is no Exception."""


def fail(*args, **kwargs):
    raise PanicException("slice index starts at 3 but ends at 1\nmore")


def test_a_panic_of_native_code_is_one_line(toy_folder, monkeypatch):
    loaded = load_tokenizer(toy_folder)
    monkeypatch.setattr(type(loaded), "_encode_plus", fail)
    with pytest.raises(UserError, match="tokenizer fails on a prompt: slice index.* at 1$"):
        tokenize(loaded, TEXTS, 6, None)
    with pytest.raises(UserError, match=f"{toy_folder} holds no tokenizer.*: slice index.* at 1$"):
        load_tokenizer(toy_folder)


def test_a_tokenizer_that_repeats_the_prompt_is_refused_where_it_is_too_long(toy_folder):
    """Truncation counts a prompt once, however often the template has it."""
    path = toy_folder / "tokenizer.json"
    written = json.loads(path.read_text())
    single = written["post_processor"]["single"]
    written["post_processor"]["single"] = single + single
    path.write_text(json.dumps(written))
    with pytest.raises(UserError, match="it gives .* tokens where 6 are allowed"):
        tokenize(load_tokenizer(toy_folder), ["a red circle above a blue square"], 6, None)
