"""A small tokenizer that behaves as Gemma's does: for tests and for random checkpoints."""

import string

from sana_jax.text import import_transformers

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "▁"
ALPHABET = SPACE + "\n" + "".join(chr(c) for c in range(0x21, 0x7F))
WORDS = """
a an the of and with in on above below left right inside between
red green blue yellow orange purple pink black white gray
circle square triangle star ring line dot shape
small large big two three dark light striped
cat dog bird tree house car sun sky sea city photo painting
""".split()


def toy_tokenizer():
    """Byte-pair encoding with a space as the first letter of a word, and bytes for the rest.

    As with Gemma, `<bos>` comes first, nothing comes last, and a space before a word merges into
    it. A known word is one token, any other its longest known beginning and then letters.
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
    """A tokenizer of transformers from one of `tokenizers` that has the tokens of SPECIAL.

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
