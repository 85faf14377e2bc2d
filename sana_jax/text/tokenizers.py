"""Tokenizers: loaded from a transformers folder, trained on captions, or a toy for tests.

The two that are made here behave like Gemma's: `<bos>` comes first, nothing comes last.
"""

import importlib
import json
import logging as standard_logging
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import logging

from sana_jax.runtime.errors import UserError, refused
from sana_jax.runtime.files import check_itself, read_json
from sana_jax.text.prompts import ONE_THREAD, clean_prompt

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"
ALPHABET = SPACE + "\n" + "".join(chr(c) for c in range(0x21, 0x7F))
SMALLEST = len(SPECIAL) + len(BYTES) + len(ALPHABET)  # vocabulary of train_tokenizer
WORDS = """
a an the of and with in on above below left right inside between
red green blue yellow orange purple pink black white gray
circle square triangle star ring line dot shape
small large big two three dark light striped
cat dog bird tree house car sun sky sea city photo painting
""".split()


def train_tokenizer(captions: Iterable[str], vocab_size: int, folder: str | Path):
    """Trains a tokenizer on captions, writes it to `folder` and returns it (of transformers).

    Byte-pair encoding inside words; a word includes the space before it, and a punctuation mark is
    a word. `<bos>` comes first and nothing last, padding is on the right. Letters are printable
    ASCII; all other characters are bytes, so that any text can be encoded. Runs of white space
    count as one space; captions are cleaned as prompts are (`clean_prompt`). The same captions, in
    any order, give the same files. The tokenizer has `vocab_size` tokens, or fewer if all words
    are known.

    Raises UserError if `vocab_size` has no room for letters and bytes.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
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
    fast = as_gemma(tokenizer)
    fast.save_pretrained(folder)
    return fast


def import_transformers():
    """Imports transformers without its advice that PyTorch is missing. Takes a second."""

    def is_other(record):
        return "PyTorch was not found" not in record.getMessage()

    logger = standard_logging.getLogger("transformers")
    logger.addFilter(is_other)
    try:
        import transformers
    finally:
        logger.removeFilter(is_other)
    return transformers


def load_tokenizer(folder: str | Path):
    """Loads the tokenizer in a folder that transformers wrote. Raises UserError.

    The tokens of a text follow from the text alone, and `<bos>` comes first: see `_settle`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: it should hold the tokenizer")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder} has no tokenizer.json")
    transformers = import_transformers()
    with refused(f"{folder} holds no tokenizer that transformers reads"):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".model") and path.is_file():
                check_itself(path)
        if (folder / "tokenizer.json").is_file():
            _check_prefix(folder / "tokenizer.json")
        else:
            _check_sentencepiece(folder / "tokenizer.model")
        config = folder / "tokenizer_config.json"
        settings = read_json(config) if config.is_file() else {}
        name = str(settings.get("tokenizer_class"))
        # By its name, because AutoTokenizer imports torch where that is installed.
        known = getattr(transformers, name, None) if "Token" in name else None
        kind = known or transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not one of the library `tokenizers`")
        return _settle(tokenizer, folder, settings)


def save_tokenizer(tokenizer, folder: str | Path) -> None:
    """Writes a tokenizer as transformers does, without the state that its last call left."""
    with ONE_THREAD:
        _drop_state(tokenizer)
        tokenizer.save_pretrained(folder)


def vocabulary_size(tokenizer) -> int:
    """Returns the rows that an embedding needs: the tokenizer's largest id, and one."""
    return max((*tokenizer.get_vocab().values(), *tokenizer.encode("")), default=-1) + 1


def _check_prefix(path: Path) -> None:
    """Refuses what `tokenizers` 0.23 cuts inside a character, which ends the process."""
    found = re.search(rb'"continuing_subword_prefix"\s*:\s*"([^"]*)', path.read_bytes())
    if found and (not found[1].isascii() or b"\\" in found[1]):
        raise UserError(f"{path}: continuing_subword_prefix is not plain ASCII")


def _check_sentencepiece(path: Path) -> None:
    """Checks a tokenizer.model, which transformers takes for another format if it is damaged."""
    for package, module in ("sentencepiece",) * 2, ("protobuf", "google.protobuf"):
        try:
            importlib.import_module(module)
        except ImportError:
            raise UserError(
                f"{path} needs {package}, which is not installed: pip install {package}, or put"
                " the same model's tokenizer.json beside it"
            ) from None
    with refused(f"{path} is no SentencePiece model"):
        importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=str(path))


def _settle(tokenizer, folder: Path, settings: dict[str, Any]):
    """Returns a loaded tokenizer, set to tokenise as the published models' does.

    Dropout is for training tokenizers' models; to cut and to pad is our own business. Gemma's
    `<bos>` comes first: transformers 5 leaves it out where neither tokenizer.json nor
    tokenizer_config.json asks for it, which its version 4, that wrote the published folders, did
    not. Raises UserError if it is switched off.
    """
    model = tokenizer.backend_tokenizer.model
    if getattr(model, "dropout", None):
        logging.warning("%s: dropout %g is switched off, for training only", folder, model.dropout)
        model.dropout = None
    _drop_state(tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    first, bos = tokenizer.encode("")[:1], tokenizer.bos_token_id
    if first and bos in (None, *first):
        return tokenizer
    if settings.get("add_bos_token") is False:
        raise UserError(
            f"{folder / 'tokenizer_config.json'} has add_bos_token false, but the text encoder"
            " needs <bos> before every prompt: set it to true"
        )
    if bos is None:
        raise UserError(
            f"{folder} names no bos_token, which the text encoder needs before every prompt: set it"
            " in tokenizer_config.json"
        )
    tokenizer.add_bos_token = True
    return tokenizer


def _drop_state(tokenizer) -> None:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def toy_tokenizer():
    """Makes a tokenizer for tests: byte-pair encoding, with bytes for unknown characters.

    As with Gemma, `<bos>` comes first, nothing comes last, and a space before a word merges into
    the word. A known word is one token, any other its longest known beginning and then letters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Every merge adds a letter to the beginning of a word.
    merges = {}
    for word in (SPACE, *string.ascii_lowercase, *WORDS):
        for end in range(1, len(word) + 1):
            merges[SPACE + word[:end]] = (SPACE + word[: end - 1], word[end - 1])
    vocabulary = [*SPECIAL, *BYTES, *ALPHABET, *merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=list(merges.values()),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return as_gemma(tokenizer)


def as_gemma(tokenizer):
    """Wraps a tokenizer of `tokenizers`, which has the tokens of SPECIAL, for transformers.

    As with Gemma, `<bos>` comes first, nothing comes last, and padding is on the right.
    """
    from tokenizers import AddedToken, processors

    bos = ("<bos>", SPECIAL.index("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[bos])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="right",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
