"""Prompt -> tokens -> the window of rows that the transformer attends to.

SANA (arXiv 2410.10629, section 2.4) puts a long instruction before the prompt, the "complex human
instruction", so that Gemma thinks about pictures. Gemma reads both; the transformer sees the first
row and the last `rows` - 1 of a sequence of fixed length, which are those of the prompt. The tokens
of the instruction stand apart here: what Gemma makes of them is the same for every prompt.

Everything here runs on the host, except `gather_window`. Nothing downloads.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int32

SHORTEST = 16  # lengths are rounded up to this times a power of two, so that few are compiled


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """What the text encoder reads, and which of its rows the transformer then sees.

    After a prefix the first row of the window is that of the prefix.
    """

    prefix: tuple[int, ...]  # the tokens before those of every prompt
    tokens: Int32[np.ndarray, "B L"]
    window: Int32[np.ndarray, " rows"]  # positions in 0 .. L - 1
    mask: Bool[np.ndarray, "B rows"]  # False: a row to ignore


def clean_prompt(prompt: str) -> str:
    """Lower case, without the white space around it: what the released models are prompted with."""
    return prompt.lower().strip()


def tokenize(
    tokenizer,
    prompts: list[str],
    rows: int,
    instruction: str | None,
    fixed_width: bool = False,
) -> TokenizedPrompts:
    """The tokens of `prompts` and their window, as diffusers' SanaPipeline has them.

    With an instruction of n tokens the sequence ends at n + rows - 2: its first token stands apart,
    and the space that ends it merges into the first word of the prompt. What is longer is cut.

    `fixed_width`: as wide as the longest prompt needs, so that one program reads all batches; what
    is cut goes unsaid.
    """
    before = mend(instruction or "")
    texts = [before + clean_prompt(mend(prompt)) for prompt in prompts]
    told = tokenizer.encode(before) if before else []
    limit = len(told) + rows - 2 if before else rows
    sequences = tokenizer(texts, max_length=limit, truncation=True, padding=False)["input_ids"]
    lengths = np.array([len(sequence) for sequence in sequences])
    if not fixed_width:
        _warn_of_cuts(tokenizer, texts, lengths, limit, rows)

    # The last one may merge with the prompt; a strange prompt reaches further.
    prefix = told[: min(len(told), limit) - 1]
    if any(sequence[: len(prefix)] != prefix for sequence in sequences):
        prefix = []
    start = len(prefix)
    width = limit - start
    if not fixed_width:  # causal attention never looks at the padding: compute what is needed
        shorter = SHORTEST
        while start + shorter < lengths.max():
            shorter *= 2
        width = min(width, shorter)
    tokens = np.full((len(texts), width), tokenizer.pad_token_id or 0, np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence) - start] = sequence[start:]
    window = np.arange(limit - rows, limit, dtype=np.int32)
    window[0] = 0
    mask = window[None] < lengths[:, None]
    window = np.clip(window - start, 0, width - 1)
    return TokenizedPrompts(tuple(prefix), tokens, window, mask)


def gather_window(
    hidden: Float[Array, "B L C"],
    window: Int32[Array, " rows"],
    mask: Bool[Array, "B rows"],
    first: Float[Array, "1 C"] | None = None,
) -> Float[Array, "B rows C"]:
    """The rows that the transformer sees, in float32; those that the mask hides are zeros.

    `first`: the first of them, where it is not among `hidden`.
    """
    rows = jnp.take(hidden, window, axis=1)
    if first is not None:
        rows = rows.at[:, 0].set(first)
    return jnp.where(mask[..., None], rows.astype(jnp.float32), 0.0)


def mend(text: str) -> str:
    """Half surrogates, which no tokenizer takes, become U+FFFD; pairs become their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _warn_of_cuts(tokenizer, texts: list[str], lengths: np.ndarray, limit: int, rows: int) -> None:
    """Says in one line how many tokens of the prompts of a batch are kept, of how many given."""
    full = (len(tokenizer.encode(t)) for t, n in zip(texts, lengths, strict=True) if n == limit)
    cuts = [f"{rows}/{n - limit + rows}" for n in full if n > limit]
    if cuts:
        logging.warning("prompts were cut, tokens kept/given: %s", ", ".join(cuts))
