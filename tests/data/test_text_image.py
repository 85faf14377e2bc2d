"""Rows of text and image: what the loader gives is what sampling has."""

import concurrent.futures
import json

import ml_dtypes
import numpy as np
import pytest

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import BadImage
from sana_jax.data.loader import EvaluationLoader, TrainingLoader
from sana_jax.data.sources import open_source
from sana_jax.data.text_image import CaptionEmbeddings, CaptionTokens, TextImageTransform
from sana_jax.data.transforms import BucketTransform, ImageTransform
from sana_jax.runtime.errors import UserError
from sana_jax.text.prompts import tokenize
from sana_jax.text.tokenizers import toy_tokenizer
from tests.data.bad_files import encode, picture
from tests.data.test_folder import make
from tests.data.test_loader import ANY

ROWS, INSTRUCTION = 12, 'Draw what is asked for.\n- "cat": a cat.\nPrompt: '
CAPTIONS = ["A Red circle ", "zebra", "一只猫 😀", "cat " * 40, "a blue square above a cat"]
IMAGE = ImageTransform(16, 16, crop="random", flip=True)


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    files = {}
    for i in range(10):
        files[f"{i}.png"] = encode(picture(i), "PNG")
        scores = [20.0 + i, 30.0 - i]
        files[f"{i}.json"] = {"captions": [f"a cat and {i} dogs", f"{i} birds"], "scores": scores}
    return open_source(str(make(tmp_path_factory.mktemp("photos"), files)))


def as_record(captions):
    return {"key": "k", "captions": captions, "scores": [], "truth": ""}


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_tokens_are_those_of_sampling(tokenizer, instruction):
    """In one width for all captions, however long."""
    tokens = CaptionTokens(tokenizer, ROWS, instruction)
    width = ROWS if instruction is None else ROWS - 1
    sampled = tokenize(tokenizer, CAPTIONS, ROWS, instruction)
    assert tokens.prefix == sampled.prefix and bool(tokens.prefix) == bool(instruction)
    first = 1 if instruction else 0  # of the window's rows, that of the prefix
    np.testing.assert_array_equal(tokens.window[first:], np.arange(width))
    for i, caption in enumerate(CAPTIONS):
        row = tokens(as_record([caption]), 0)
        assert row["tokens"].shape == (width,) and row["tokens"].dtype == np.int32
        assert row["mask"].shape == (ROWS,) and row["mask"].dtype == bool
        np.testing.assert_array_equal(row["mask"], sampled.mask[i])
        shown = row["tokens"][tokens.window][row["mask"]][first:]
        np.testing.assert_array_equal(
            shown, sampled.tokens[i][sampled.window][sampled.mask[i]][first:]
        )


def test_the_empty_prompt_has_no_instruction_and_its_own_mask(tokenizer):
    empty = CaptionTokens(tokenizer, ROWS, INSTRUCTION).empty
    assert empty.prefix == () and empty.tokens.shape == (1, ROWS)
    assert empty.tokens[0, 0] == tokenizer.bos_token_id and empty.mask.tolist() == [
        [True] + [False] * (ROWS - 1)
    ]
    np.testing.assert_array_equal(empty.window, np.arange(ROWS))


def test_a_caption_that_changes_the_prefix_is_rejected():
    """Here one that merges with more than the last token of the instruction."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "a", "b", "c", "bc", "abc"])}
    merges = [("b", "c"), ("a", "bc")]
    strange = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=merges)), pad_token="<pad>"
    )
    tokens = CaptionTokens(strange, 4, "aab")
    assert tokens.prefix == (1, 1)
    assert tokens(as_record(["b"]), 0)["mask"].any()
    with pytest.raises(BadImage, match="bad_caption: 'c' merges with the instruction"):
        tokens(as_record(["c"]), 0)


def test_threads_share_a_tokenizer(tokenizer):
    tokens = CaptionTokens(tokenizer, ROWS, INSTRUCTION)
    record = as_record(CAPTIONS)
    expected = [tokens(record, i % 5)["tokens"] for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: tokens(record, i % 5)["tokens"], range(200)))
        tokenize(tokenizer, CAPTIONS * 20, ROWS, INSTRUCTION)  # sampling meanwhile
    np.testing.assert_array_equal(found, expected)


def test_a_training_batch_has_what_the_trainer_reads(photos, tokenizer):
    transform = TextImageTransform(IMAGE, CaptionTokens(tokenizer, ROWS), CaptionChoice("score"))
    loader = TrainingLoader(photos, transform, batch_size=5, seed=1)
    batch = loader.batch(3)
    kinds = {name: (value.shape, str(value.dtype)) for name, value in batch.items()}
    assert kinds == {
        "image": ((5, 16, 16, 3), "uint8"),
        "tokens": ((5, ROWS), "int32"),
        "mask": ((5, ROWS), "bool"),
    }
    alone = TrainingLoader(photos, IMAGE, batch_size=5, seed=1)  # the crop is the image's alone
    np.testing.assert_array_equal(batch["image"], alone.batch(3)["image"])
    for index, key in enumerate(f"{i}.png" for i in range(10)):
        record = photos[index]
        assert record["key"] == key
        chosen = transform(record, np.random.default_rng((1, index)))["tokens"]
        captions = [transform.text(record, i)["tokens"].tolist() for i in range(2)]
        assert chosen.tolist() in captions


def test_item_28_images_without_captions_are_counted(tmp_path, tokenizer):
    files = {f"{i}.png": encode(picture(i), "PNG") for i in range(8)}
    files |= {f"{i}.txt": "a cat" for i in range(5)} | {"6.txt": b"\xff\xfe", "7.txt": " \n"}
    source = open_source(str(make(tmp_path, files)))
    transform = TextImageTransform(IMAGE, CaptionTokens(tokenizer, ROWS))
    batches = iter(TrainingLoader(source, transform, batch_size=8, budget=ANY))
    for _ in range(3):
        next(batches)
    counts = batches.counts
    assert counts.used == 24 and counts.read == 24 + counts.rejected["bad_caption"]
    assert counts.rejected["bad_caption"] >= 9
    assert set(counts.examples) == {"5.png", "6.png", "7.png"} or "record 6" in counts.examples


def test_evaluation_tells_rows_of_text_from_rows_of_the_batch(photos, tokenizer):
    transform = TextImageTransform(ImageTransform(16, 16), CaptionTokens(tokenizer, ROWS))
    *_, last = EvaluationLoader(photos, transform, batch_size=8)
    assert last["valid"].tolist() == [True, True] + [False] * 6
    assert (
        last["mask"].shape == (8, ROWS) and last["mask"].any(1).tolist() == last["valid"].tolist()
    )


def test_stored_embeddings_are_padded():
    stored = [np.full((n, 3), n, ml_dtypes.bfloat16) for n in (2, 4)]
    row = CaptionEmbeddings(4)(as_record(["a", "b"]) | {"embeddings": stored}, 0)
    assert row["embeddings"].dtype == ml_dtypes.bfloat16 and row["embeddings"].shape == (4, 3)
    assert row["embeddings"][:, 0].tolist() == [2, 2, 0, 0]
    assert row["mask"].tolist() == [True, True, False, False]


def test_buckets_fit_the_image():
    transform = BucketTransform(((16, 32), (24, 24), (32, 16)))
    images = {(40, 48): (24, 24), (20, 48): (16, 32), (48, 20): (32, 16)}
    for have, wanted in images.items():
        record = {"image": encode(np.resize(picture(), (*have, 3)), "PNG")}
        assert transform(record, np.random.default_rng(0))["image"].shape == (*wanted, 3)
    with pytest.raises(BadImage, match="too_small"):
        transform({"image": encode(picture()[:20, :20], "PNG")}, np.random.default_rng(0))
    with pytest.raises(UserError, match="centre or random"):
        BucketTransform(((16, 16),), crop="patch")


def test_settings_are_what_decides(tokenizer):
    def settings(image=IMAGE, rows=ROWS, instruction=None, captions="first", tokenizer=tokenizer):
        text = CaptionTokens(tokenizer, rows, instruction)
        transform = TextImageTransform(image, text, CaptionChoice(captions))
        transform.text(as_record(["a cat"]), 0)  # tokenizing leaves no trace in them
        return json.dumps(transform.settings)

    other = toy_tokenizer()
    other.add_tokens(["zebra"])
    made = [
        settings(),
        settings(image=ImageTransform(16, 20)),
        settings(image=BucketTransform(((16, 16),))),
        settings(rows=13),
        settings(instruction=INSTRUCTION),
        settings(captions="uniform"),
        settings(tokenizer=other),
    ]
    assert len(set(made)) == len(made) and settings() == made[0]
