"""Prompts to rows, against diffusers' pipeline."""

import functools
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import SanaPipeline

from sana_jax.checkpoints.diffusers_configs import config_json
from sana_jax.models.gemma2 import Gemma2, Gemma2Config
from sana_jax.runtime.errors import UserError
from sana_jax.text import prompts as module
from sana_jax.text.prompts import clean_prompt, gather_window, tokenize
from sana_jax.text.tokenizers import load_tokenizer, toy_tokenizer
from tests import toy

ROWS = 12
# Joined by newlines; the prompt follows the last space.
INSTRUCTION = ["Draw what is asked for, well lit.", '- "cat": a grey cat.', "Prompt: "]
PROMPTS = [
    "",
    "cat",
    "  A Red CIRCLE ",
    "zebra",  # no word of the tokenizer: only its first letter merges with the space
    "一只猫 😀",
    "a small red circle above a large blue square, dark sky, a city of light, photo",
    "1 + <pad> 1",
]


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def encoders(tokenizer):
    """A Gemma of transformers and ours, of the same weights."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=20,
    )
    theirs = transformers.Gemma2Config(**config_json(config))
    theirs._attn_implementation = "eager"
    module = toy.randomise(transformers.Gemma2Model(theirs))
    module.embed_tokens.embed_scale.fill_(config.hidden_size**0.5)  # a constant, not a weight
    params = {"params": toy.params(module, config)}
    return module, jax.jit(
        functools.partial(Gemma2(config).apply, params), static_argnames="method"
    )


def rows_of(tokenizer, apply, prompts, rows, instruction):
    found = tokenize(tokenizer, prompts, rows, instruction)
    prefix = found.prefix and apply(np.array([found.prefix]), method="read_prefix")
    hidden = apply(found.tokens, prefix or None)
    first = prefix.first if prefix else None
    return np.asarray(gather_window(hidden, found.window, found.mask, first)), found.mask


@torch.no_grad()
def rows_of_diffusers(tokenizer, module, prompts, rows, instruction):
    pipe = SanaPipeline(tokenizer, module, vae=None, transformer=None, scheduler=None)
    embeddings, mask, _, _ = pipe.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=rows,
        complex_human_instruction=instruction,
    )
    return embeddings.numpy(), mask.numpy()


INSTRUCTIONS = {"none": None, "ends in a space": INSTRUCTION, "ends in a letter": ["draw a"]}


@pytest.mark.parametrize("rows", [2, ROWS, 70])
@pytest.mark.parametrize("lines", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_rows_are_those_of_diffusers(tokenizer, encoders, lines, rows):
    module, apply = encoders
    instruction = lines and "\n".join(lines)
    theirs, their_mask = rows_of_diffusers(tokenizer, module, PROMPTS, rows, lines)
    ours, mask = rows_of(tokenizer, apply, PROMPTS, rows, instruction)
    np.testing.assert_array_equal(mask, their_mask)
    assert ours.dtype == np.float32
    toy.assert_close(ours[mask], theirs[mask], 2e-5)
    assert not ours[~mask].any()
    # A prompt keeps its rows whatever is beside it.
    for i in (0, 1, 5):
        alone, alone_mask = rows_of(tokenizer, apply, PROMPTS[i : i + 1], rows, instruction)
        np.testing.assert_array_equal(alone_mask[0], mask[i])
        toy.assert_close(alone[0], ours[i], 2e-6)


def test_only_what_a_batch_needs_is_computed(tokenizer):
    long = "zebra " * 100
    instruction = "\n".join(INSTRUCTION)
    for prompts, rows, told, expected in [
        (["", "cat"], 300, None, 16),
        (["a" + " cat" * 14], 300, None, 16),  # with <bos>
        (["a" + " cat" * 15], 300, None, 32),
        (["a" + " cat" * 15], 300, instruction, 16),  # <bos> belongs to the prefix
        (["a" + " cat" * 16], 300, instruction, 32),
        ([long], 300, None, 300),
        ([long], 20, None, 20),
        ([long, ""], 300, instruction, 299),
        ([long, ""], 20, instruction, 19),
        ([""], 2, instruction, 1),
        (["cat"], 1, instruction, 1),
    ]:
        found = tokenize(tokenizer, prompts, rows, told)
        assert found.tokens.shape == (len(prompts), expected)
        assert found.tokens.dtype == found.window.dtype == np.int32
        assert found.mask.dtype == bool and found.mask.shape == (len(prompts), rows)
        assert found.window.shape == (rows,) and found.window.max() < expected


def test_prefix_is_what_all_prompts_begin_with(tokenizer):
    instruction = "\n".join(INSTRUCTION)
    expected = tuple(tokenizer.encode(instruction)[:-1])
    assert tokenize(tokenizer, ["cat"], ROWS, None).prefix == ()
    for prompts in (PROMPTS, PROMPTS[::-1], [""], ["cat" * 40]):
        found = tokenize(tokenizer, prompts, ROWS, instruction)
        assert found.prefix == expected
        for prompt, tokens in zip(prompts, found.tokens, strict=True):
            whole = tokenizer.encode(instruction + clean_prompt(prompt))[len(expected) :][:ROWS]
            count = min(len(whole), len(tokens))
            assert tokens[:count].tolist() == whole[:count] and not tokens[count:].any()


def test_prompts_that_reach_into_the_instruction(tokenizer, encoders):
    """Three tokens of the instruction and two of a prompt are one, so nothing stands apart."""
    module, apply = encoders
    lines, prompts = ["draw a red <pa"], ["d> cat", "cat"]
    assert len(tokenize(tokenizer, prompts[1:], ROWS, lines[0]).prefix) > 1
    assert tokenize(tokenizer, prompts, ROWS, lines[0]).prefix == ()
    theirs, mask = rows_of_diffusers(tokenizer, module, prompts, ROWS, lines)
    ours, our_mask = rows_of(tokenizer, apply, prompts, ROWS, lines[0])
    np.testing.assert_array_equal(our_mask, mask)
    toy.assert_close(ours[our_mask], theirs[our_mask], 2e-5)


def test_threads_share_a_tokenizer(tokenizer):
    """Truncation is its state: threads took one another's, and got other tokens or an error."""
    words = "a red circle above a blue square, " * 40
    batches = [[words[: 20 + 113 * ((i + j) % 9)] for j in range(8)] for i in range(9)]

    def tokens(i):
        return tokenize(tokenizer, batches[i], 24, ["draw: ", None][i % 2]).tokens.tolist()

    alone = [tokens(i) for i in range(9)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokens, [*range(9)] * 40)) == alone * 40


def test_hidden_rows_are_zeros_whatever_stands_there():
    hidden = jnp.full((1, 4, 3), jnp.nan, jnp.bfloat16).at[:, [0, 2]].set(1.5)
    mask = np.array([[True, True, False]])
    rows = gather_window(hidden, np.array([0, 2, 3], np.int32), mask)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, np.array([[[1.5] * 3, [1.5] * 3, [0] * 3]]))
    first = jnp.full((1, 3), 2, jnp.bfloat16)
    rows = gather_window(hidden, np.array([1, 2, 3], np.int32), mask, first)
    np.testing.assert_array_equal(rows, np.array([[[2.0] * 3, [1.5] * 3, [0] * 3]]))


def test_window_starts_at_the_first_word(tokenizer):
    found = tokenize(tokenizer, ["cat dog"], ROWS, "\n".join(INSTRUCTION))
    rows = tokenizer.convert_ids_to_tokens(found.tokens[0, found.window])
    first = tokenizer.convert_ids_to_tokens(found.prefix[0])
    assert [first, *rows[1:3]] == ["<bos>", "▁cat", "▁dog"]
    assert found.mask[0].tolist() == [True] * 3 + [False] * (ROWS - 3)


def test_special_tokens_in_a_prompt_count(tokenizer):
    """A prompt may name <pad> or <eos>: in the text they are tokens like any other."""
    found = tokenize(tokenizer, ["a <pad> b <eos> c"], ROWS, None)
    assert found.mask.sum() == len(tokenizer("a <pad> b <eos> c")["input_ids"])


def test_strange_prompts(tokenizer):
    """Half a surrogate pair crashes tokenizers; a whole one is its character."""
    found = tokenize(tokenizer, ["a\ud800b", "a\ufffdb", "\ud83d\ude00", "😀", "a\0b"], ROWS, None)
    np.testing.assert_array_equal(found.tokens[0], found.tokens[1])
    np.testing.assert_array_equal(found.tokens[2], found.tokens[3])
    assert found.mask[4].sum() == 4
    assert tokenize(tokenizer, ["cat"], ROWS, "\udfff: ").mask.sum() == 2


def test_cut_prompts_are_told_in_one_line(tokenizer, caplog):
    caplog.set_level(logging.WARNING, "absl")
    prompts = ["a" + " cat" * count for count in (10, 11, 0, 29)]
    for instruction in None, "\n".join(INSTRUCTION):
        caplog.clear()
        tokenize(tokenizer, prompts, ROWS, instruction)
        (record,) = caplog.records
        assert record.getMessage() == "prompts were cut, tokens kept/given: 12/13, 12/31"
    caplog.clear()
    tokenize(tokenizer, prompts[:1], ROWS, None)
    assert not caplog.records


@pytest.mark.parametrize("text", ["a red circle ", "a", "é🎨", " \n a"])
def test_of_a_prompt_without_end_little_is_looked_at(tokenizer, monkeypatch, caplog, text):
    """The same tokens are kept as if all were made, which would take gigabytes."""
    caplog.set_level(logging.WARNING, "absl")
    long = text * (100 * module.LONGEST * ROWS // len(text))
    for instruction in None, "Think. ":
        monkeypatch.undo()
        caplog.clear()
        found = tokenize(tokenizer, [long], ROWS, instruction)
        assert caplog.records[0].getMessage().endswith("+")
        monkeypatch.setattr(module, "LONGEST", 10**9)
        whole = tokenize(tokenizer, [long], ROWS, instruction)
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        np.testing.assert_array_equal(found.mask, whole.mask)


def test_clean_prompt():
    assert clean_prompt("\n  A Red\tCAT. ") == "a red\tcat."


def test_toy_tokenizer(tokenizer, tmp_path):
    assert len(tokenizer) <= 600
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a red circlet, é")["input_ids"])
    pieces = ["<bos>", "a", "▁red", "▁circle", "t", ",", "▁", "<0xC3>", "<0xA9>"]
    assert tokens == pieces
    for text in PROMPTS:
        assert tokenizer.decode(tokenizer.encode(text)) == "<bos>" + text

    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # What transformers 4 and 5 call Gemma's; None: left out.
    for name in (config["tokenizer_class"], "GemmaTokenizer", "GemmaTokenizerFast", None):
        config["tokenizer_class"] = name
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v is not None})
        )
        for loaded in (
            load_tokenizer(tmp_path),
            transformers.AutoTokenizer.from_pretrained(tmp_path),
        ):
            assert loaded(PROMPTS)["input_ids"] == tokenizer(PROMPTS)["input_ids"]
        assert load_tokenizer(tmp_path).padding_side == "right"


def test_tokenizer_folder_that_cannot_be_used(tokenizer, tmp_path):
    with pytest.raises(UserError, match="nowhere is missing"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="holds no tokenizer that transformers reads") as info:
        load_tokenizer(tmp_path)
    assert "\n" not in str(info.value)


SCRIPT = """
import sys
{first}
import sana_jax.text.instruction, sana_jax.text.prompts, sana_jax.text.tokenizers
assert "transformers" not in sys.modules
assert sana_jax.text.instruction.find_instruction() is not None
tokenizer = sana_jax.text.tokenizers.toy_tokenizer()
tokenizer.save_pretrained({folder!r})
tokenizer = sana_jax.text.tokenizers.load_tokenizer({folder!r})
sana_jax.text.prompts.tokenize(tokenizer, ["cat"], 4, None)
assert not sys.modules.get("torch") and "diffusers" not in sys.modules
"""


@pytest.mark.parametrize("first", ["", "sys.modules['torch'] = None"], ids=["torch", "no torch"])
def test_nothing_heavy_is_imported_and_nothing_said(first, tmp_path):
    script = SCRIPT.format(first=first, folder=str(tmp_path))
    command = [sys.executable, "-W", "ignore", "-c", script]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
