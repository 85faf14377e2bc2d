"""A small tokenizer of our own, trained on captions, that behaves as Gemma's does."""

import json
from collections.abc import Iterable
from pathlib import Path

from sana_jax.errors import UserError
from sana_jax.text import clean_prompt, import_transformers
from sana_jax.toy_tokenizer import ALPHABET, SPACE, SPECIAL

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SMALLEST = len(SPECIAL) + len(BYTES) + len(ALPHABET)


def train_tokenizer(captions: Iterable[str], vocab_size: int, folder: str | Path):
    """Trains on the captions, writes to `folder`, and returns the tokenizer (of transformers).

    Byte-pair encoding inside words; a word holds the space before it, and a punctuation mark
    stands alone. `<bos>` comes first and nothing last, padding is on the right. Letters are
    printable ASCII; all others are bytes, so that any text can be encoded. White space is one
    space; captions are lower-cased as prompts are (text.clean_prompt). The same captions, in any
    order, give the same files. `len()` of it is `vocab_size`, or less where all words are known.

    Raises UserError where `vocab_size` has no room for letters and bytes.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if vocab_size < SMALLEST:
        raise UserError(f"vocab_size={vocab_size}: letters and bytes alone are {SMALLEST}")

    def around(model):
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
        words = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True)
        marks = pre_tokenizers.Punctuation("isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, marks])
        return tokenizer

    merging = around(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(BYTES),
        initial_alphabet=list(ALPHABET),
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    merging.train_from_iterator(map(clean_prompt, captions), trainer)
    learned = sorted(merging.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(merging.to_str())["model"]["merges"]
    # Bytes must not be special: a prompt may hold the text "<0x41>".
    vocabulary = [*SPECIAL, *BYTES, *(token for token, _ in learned)]
    tokenizer = around(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=[tuple(pair) for pair in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bos = ("<bos>", SPECIAL.index("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[bos])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    fast = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    fast.save_pretrained(folder)
    return fast
