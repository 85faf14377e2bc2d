"""Makes rows of text-to-image batches: pixels or latents, and a caption's tokens or embeddings.

    tokens = CaptionTokens(checkpoint.tokenizer, checkpoint.text_rows, instruction)
    image = ImageTransform(512, 512, crop="random")
    transform = TextImageTransform(image, tokens, CaptionChoice("score"))

gives "image" and the caption's "tokens" and "mask". StoredLatents instead of the image and
CaptionEmbeddings instead of the tokens read the output of `python -m sana_jax.precompute`.
"""

import copy
import dataclasses
import hashlib
from typing import Any, Protocol

import numpy as np

from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import BadImage
from sana_jax.data.records import Record
from sana_jax.data.transforms import Example, Transform
from sana_jax.text.prompts import ONE_THREAD, TokenizedPrompts, tokenize


class CaptionTransform(Protocol):
    """Turns one caption of a record into its part of a batch."""

    @property
    def settings(self) -> dict[str, Any]: ...

    def __call__(self, record: Record, caption: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class TextImageTransform:
    """Applies `image` to a record, and `text` to the caption that `captions` chooses."""

    image: Transform
    text: CaptionTransform
    captions: CaptionChoice = CaptionChoice()

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name).settings for name in ("image", "text", "captions")}

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        image = self.image(record, rng)
        return image | self.text(record, self.captions(record, rng))


class CaptionTokens:
    """Makes {"tokens": int32 (L,), "mask": bool (rows,)} as sampling does, in one width.

    Attributes:
      prefix: the tokens of the instruction before those of every caption, as a tuple of ints.
      window: positions of the rows that the transformer sees, as in TokenizedPrompts.
      empty: the tokens of the empty prompt without instruction, for the null embedding: a
        TokenizedPrompts of one row, with a window and a mask of its own.

    A caption that the tokenizer merges with the instruction, which changes the prefix, is rejected
    as a bad caption.
    """

    def __init__(self, tokenizer, rows: int, instruction: str | None = None):
        self._tokenizer = copy.deepcopy(tokenizer)
        self._rows, self._instruction = rows, instruction
        told = self._tokenize("", instruction)
        self.prefix, self.window = told.prefix, told.window
        self.empty = self._tokenize("", None)

    def __call__(self, record: Record, caption: int) -> Example:
        words = record["captions"][caption]
        found = self._tokenize(words, self._instruction)
        if found.prefix != self.prefix:
            raise BadImage("bad_caption", f"{words[:40]!r} merges with the instruction")
        return {"tokens": found.tokens[0], "mask": found.mask[0]}

    @property
    def settings(self) -> dict[str, Any]:
        backend = self._tokenizer.backend_tokenizer
        with ONE_THREAD:
            backend.no_truncation()
            digest = hashlib.sha256(backend.to_str().encode())
        told = self._instruction and hashlib.sha256(self._instruction.encode()).hexdigest()
        return {"tokenizer": digest.hexdigest(), "rows": self._rows, "instruction": told}

    def _tokenize(self, caption: str, instruction: str | None) -> TokenizedPrompts:
        return tokenize(self._tokenizer, [caption], self._rows, instruction, True)


@dataclasses.dataclass(frozen=True)
class CaptionEmbeddings:
    """Makes {"embeddings": (rows, T) as stored, "mask": bool (rows,)} from stored embeddings.

    Rows that the mask hides are zeros.
    """

    rows: int

    @property
    def settings(self) -> dict[str, Any]:
        return {"embeddings": "stored", "rows": self.rows}

    def __call__(self, record: Record, caption: int) -> Example:
        return pad_rows(record["embeddings"][caption], self.rows)


def pad_rows(embeddings: np.ndarray, rows: int) -> Example:
    """Pads the rows that count to {"embeddings": (rows, T), "mask": (rows,)}."""
    padded = np.zeros((rows, embeddings.shape[1]), embeddings.dtype)
    padded[: len(embeddings)] = embeddings
    return {"embeddings": padded, "mask": np.arange(rows) < len(embeddings)}
