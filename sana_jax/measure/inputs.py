"""The parts that are measured and their inputs, the same for us and for diffusers."""

import dataclasses
import itertools

import numpy as np

from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.quantised import quantise
from sana_jax.models.dit import SanaConfig
from sana_jax.text.tokenizers import WORDS

# part -> the network that it runs
PARTS = {
    "text": "text_encoder",
    "trunk": "dit",
    "loop": "dit",
    "decode": "vae",
    "encode": "vae",
}
INSTRUCTION_TOKENS = 222  # as many as the published instruction has
PROMPT_TOKENS = 20
GUIDANCE_SCALE = 4.5
TIMESTEP = 500.0
DISTINCT = 10_000_019  # different weights of a kind; a prime, so that repetitions never line up


@dataclasses.dataclass(frozen=True)
class Settings:
    """One part of a preset, which both sides run."""

    preset: str
    part: str
    batch: int
    size: int  # pixels a side
    dtype: str
    steps: int  # of the loop that is timed
    compiled: bool = False  # runs the reference under torch.compile
    implementation: str = "auto"  # of our transformer's operations: kernels/dispatch.py
    quantise: str | None = None  # a method of quantisation/table.py


def checkpoint(settings: Settings):
    """Returns the preset's networks; weights are made when used, the same on both sides."""
    made = random_weights.make(settings.preset, settings.dtype, distinct=DISTINCT)
    return made if settings.quantise is None else quantise(made, settings.quantise)


def instruction() -> str:
    """Returns a text as long as the complex human instruction, in tokens.

    Every word is one token, and so is the start of a text.
    """
    return " ".join(itertools.islice(itertools.cycle(WORDS), INSTRUCTION_TOKENS - 1)) + " "


def prompts(batch: int, call: int) -> list[str]:
    """Returns short prompts of one length, new ones at every call, so that no cache helps."""
    starts = range(batch * call, batch * (call + 1))
    words = [WORDS[start % len(WORDS) :] + WORDS for start in starts]
    return [" ".join(some[: PROMPT_TOKENS - 1]) for some in words]


def halves(dit: SanaConfig) -> int:
    """Returns how often a step evaluates the network for a picture: twice, but for Sprint."""
    return 1 if dit.is_sprint else 2


def trunk(batch: int, side: int, channels: int, rows: int, width: int) -> dict[str, np.ndarray]:
    """Returns the inputs of one step, with every row of text in use.

    `batch` counts evaluations: both halves of guidance, where there are two.
    """
    rng = np.random.default_rng(0)
    return dict(
        latents=rng.standard_normal((batch, side, side, channels), np.float32),
        captions=rng.standard_normal((batch, rows, width), np.float32),
        mask=np.ones((batch, rows), bool),
    )


def loop(batch: int, side: int, channels: int, rows: int, width: int) -> dict[str, np.ndarray]:
    """Returns the inputs of sampling: noise, short prompts, and empty negatives of one token."""
    rng = np.random.default_rng(0)
    lengths = np.array([PROMPT_TOKENS, 1])[:, None, None]
    masks = np.broadcast_to(np.arange(rows) < lengths, (2, batch, rows))
    captions = rng.standard_normal((2, batch, rows, width), np.float32) * masks[..., None]
    captions[1] = captions[1, :1]  # one empty prompt for all
    return dict(
        latents=rng.standard_normal((batch, side, side, channels), np.float32),
        captions=captions[0],
        mask=masks[0],
        negative=captions[1],
        negative_mask=masks[1],
    )


def fresh(batch: int, steps: int, side: int, channels: int) -> np.ndarray:
    """Returns the noise that each of Sprint's steps adds, (batch, steps, h, w, c)."""
    shape = batch, steps, side, side, channels
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def decode(batch: int, side: int, channels: int) -> np.ndarray:
    """Returns latents of unit variance, like a sampler's."""
    return np.random.default_rng(0).standard_normal((batch, side, side, channels), np.float32)


def encode(batch: int, size: int) -> np.ndarray:
    """Returns random pixels in [-1, 1]."""
    return np.random.default_rng(0).uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)
