"""Prompt -> tokens -> the window of rows that the transformer attends to.

SANA (arXiv 2410.10629, section 2.4) puts a long instruction before the prompt, the "complex human
instruction", so that Gemma thinks about pictures. Gemma reads both. The transformer attends to the
first row and the last `rows` - 1 rows of a sequence of fixed length, which are those of the prompt.
The instruction's tokens are kept apart, because Gemma's keys and values for them are the same for
every prompt.

Everything here runs on the host, except `gather_window`. Nothing is downloaded.
"""

import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int32

from sana_jax.runtime.errors import refused

LONGEST = 128  # characters for every row: tokens are shorter, and each takes memory before the cut
SHORTEST = 16  # lengths are rounded up to this times a power of two, so that few are compiled

# Held while a tokenizer is used: truncation is a state of a fast one, which a call without it
# switches off for all threads.
ONE_THREAD = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """The tokens for the text encoder, and the rows of its output that the transformer attends to.

    Where there is a prefix, the first row of the window is the prefix's first row.
    """

    prefix: tuple[int, ...]  # the tokens before those of every prompt
    tokens: Int32[np.ndarray, "B L"]
    window: Int32[np.ndarray, " rows"]  # positions in 0 .. L - 1
    mask: Bool[np.ndarray, "B rows"]  # False: a row to ignore


def clean_prompt(prompt: str) -> str:
    """Lower-cases and strips a prompt, as the released models expect."""
    return prompt.lower().strip()


def tokenize(
    tokenizer,
    prompts: list[str],
    rows: int,
    instruction: str | None,
    fixed_width: bool = False,
) -> TokenizedPrompts:
    """Tokenizes prompts and finds their window, as diffusers' SanaPipeline does.

    With an instruction of n tokens the sequence ends at n + rows - 2: its first token is counted
    apart, and the space at its end merges into the first word of the prompt. Longer sequences are
    cut.

    `fixed_width`: pad to the longest possible prompt, so that one program reads all batches, and
    do not warn about cuts. Threads may share a tokenizer. Raises UserError if it fails.
    """
    before = mend(instruction or "")
    texts = [before + clean_prompt(mend(prompt))[: LONGEST * rows] for prompt in prompts]
    with ONE_THREAD, refused("the tokenizer fails on a prompt"):
        told = tokenizer.encode(before) if before else []
        limit = len(told) + rows - 2 if before else rows
        sequences = tokenizer(texts, max_length=limit, truncation=True, padding=False)["input_ids"]
        lengths = np.array([len(sequence) for sequence in sequences])
        if lengths.max(initial=0) > limit:  # what its post-processor adds is not cut
            raise ValueError(f"it gives {lengths.max()} tokens where {limit} are allowed")
        if not fixed_width:
            _warn_of_cuts(tokenizer, texts, lengths, limit, rows, len(before) + LONGEST * rows)

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
    """Returns the rows that the transformer attends to, in float32; masked rows are zeros.

    `first`: the first row, if it is not in `hidden`.
    """
    rows = jnp.take(hidden, window, axis=1)
    if first is not None:
        rows = rows.at[:, 0].set(first)
    return jnp.where(mask[..., None], rows.astype(jnp.float32), 0.0)


def mend(text: str) -> str:
    """Replaces half surrogates, which no tokenizer takes, by U+FFFD, pairs by characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _warn_of_cuts(
    tokenizer, texts: list[str], lengths: np.ndarray, limit: int, rows: int, longest: int
) -> None:
    """Logs one line that says how many tokens of each cut prompt are kept, of how many.

    Of texts with `longest` characters, that number has a plus.
    """
    long = [text for text, length in zip(texts, lengths, strict=True) if length == limit]
    full = ((len(tokenizer.encode(text)), "+" * (len(text) == longest)) for text in long)
    cuts = [f"{rows}/{n - limit + rows}{more}" for n, more in full if n > limit]
    if cuts:
        logging.warning("prompts were cut, tokens kept/given: %s", ", ".join(cuts))
