"""A small tokenizer of our own, trained on captions, that behaves as Gemma's does.

    python -m sana_jax.data.tokenizer --out=DIR                    # of the built-in data set
    python -m sana_jax.data.tokenizer --out=DIR --data=PHOTOS --vocab_size=8192

It reads the captions of the first records, and draws nothing for shapes.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from sana_jax import cli
from sana_jax.data.images import BadImage
from sana_jax.errors import UserError
from sana_jax.new_folder import check_new, new_folder
from sana_jax.text import clean_prompt
from sana_jax.toy_tokenizer import ALPHABET, BYTES, SPACE, SPECIAL, as_gemma

SMALLEST = len(SPECIAL) + len(BYTES) + len(ALPHABET)


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "new or empty folder", required=True)
    _DATA = flags.DEFINE_string("data", "shapes", "shapes, a folder of images, or tfds:NAME")
    _DATA_DIR = flags.DEFINE_string("data_dir", None, "where TFDS keeps a tfds:NAME")
    _SPLIT = flags.DEFINE_string("split", "train", "of the data")
    _VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 1024, "tokens, at most", SMALLEST)
    _RECORDS = flags.DEFINE_integer("records", 10_000, "whose captions are read, at most", 1)


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


def main(argv: list[str]) -> None:
    del argv
    out = check_new(_OUT.value)
    found = _captions()
    with new_folder(out):
        tokenizer = train_tokenizer(found, _VOCAB_SIZE.value, out)
    print(f"{out}: {len(tokenizer)} tokens")


def _captions() -> Iterable[str]:
    """Those of the records that the flags name. Nothing is drawn for shapes."""
    if _DATA.value == "shapes":
        from sana_jax.data.shapes_captions import captions
        from sana_jax.data.shapes_scene import scene

        scenes = (scene((0, index), _SPLIT.value) for index in range(_RECORDS.value))
        return (said.text for drawn in scenes for said in captions(drawn))
    from sana_jax.data.sources import open_source

    source = open_source(_DATA.value, _SPLIT.value, _DATA_DIR.value)
    count = min(len(source), _RECORDS.value)
    found = [text for index in range(count) for text in _read(source, index)]
    if not found:
        raise UserError(f"--data={_DATA.value}: the first {count} records have no captions")
    return found


def _read(source, index: int) -> list[str]:
    """A record's captions; none of a bad one."""
    try:
        return source[index]["captions"]
    except BadImage:
        return []


if __name__ == "__main__":
    cli.run(main)
