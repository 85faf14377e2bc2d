"""The texts of a pipeline: from prompts to the rows that its transformer sees."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.models.gemma2 import Prefix
from sana_jax.pipeline import programs
from sana_jax.pipeline.placement import Placement
from sana_jax.pipeline.remembered import Remembered
from sana_jax.pipeline.request import Request, instruction_text, texts
from sana_jax.text.prompts import tokenize


class ReadsTexts:
    """The methods of a pipeline that encode prompts.

    The text encoder's output for instructions and negative prompts is cached between calls.
    """

    checkpoint: Checkpoint
    mesh: Mesh
    params: dict[str, Any]
    text_encoder: nn.Module
    _prefixes: Remembered
    _negatives: Remembered
    _place: Placement

    def _read(self, request: Request) -> tuple[Float[Array, "B S L T"], Bool[Array, "B S L"]]:
        """Returns every picture's text; S is 2 (without and with the prompt), or 1 unguided."""
        if request.prompts is not None:
            rows, mask = self._encode_prompts(request.prompts, request.instruction)
        else:  # another pipeline's may be on other devices
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            rows, mask = jax.device_put((request.embeddings, request.mask), everywhere)
        captions, masks = rows[:, None], mask[:, None]
        if request.guided:
            if request.unconditional_mask == "prompt":
                rows = self._encode_padded(request.negative_prompts)
            else:
                rows, mask = self._encode_negative(request.negative_prompts)
            rows = jnp.broadcast_to(rows[:, None], captions.shape)
            mask = jnp.broadcast_to(mask[:, None], masks.shape)
            captions = jnp.concatenate([rows, captions], axis=1)
            masks = jnp.concatenate([mask, masks], axis=1)
        captions, masks = (jnp.repeat(x, request.images_each, axis=0) for x in (captions, masks))
        return captions, masks

    def encode_prompt(
        self, prompts: str | Sequence[str], instruction: str | None = "auto"
    ) -> tuple[Float[Array, "B L T"], Bool[Array, "B L"]]:
        """Returns the text encoder's rows in float32, and a mask; rows that it hides are zeros."""
        return self._encode_prompts(texts("prompt", prompts), instruction_text(instruction))

    def _encode_prompts(self, prompts: list[str], instruction: str | None):
        if instruction == "auto":
            found = self.checkpoint.instruction
            instruction = found.text if found else None
        tokenized = tokenize(
            self.checkpoint.tokenizer, prompts, self.checkpoint.text_rows, instruction
        )
        tokens, mask = self._place.spread(tokenized.tokens), self._place.spread(tokenized.mask)
        module, params = self.text_encoder, self.params["text_encoder"]
        prefix = self._read_prefix(tokenized.prefix)
        with self._place.context():
            rows = programs.encode_text(module, params, tokens, prefix, tokenized.window, mask)
        return rows[: len(prompts)], mask[: len(prompts)]

    def _read_prefix(self, tokens: tuple[int, ...]) -> Prefix | None:
        """Returns the text encoder's keys and values of an instruction, cached."""

        def read():
            with self._place.context():
                params = self.params["text_encoder"]
                return programs.read_prefix(self.text_encoder, params, np.array([tokens], np.int32))

        return self._prefixes.of(tokens, read) if tokens else None

    def _encode_negative(self, prompts: list[str]) -> tuple[Array, Array]:
        """Encodes negative prompts, without an instruction: one row if all prompts are equal.

        A single prompt is encoded alone, so that its bits do not depend on the first batch.
        """
        if len(set(prompts)) > 1:
            return self._encode_prompts(prompts, None)
        encode = partial(self._encode_prompts, prompts[:1], None)
        return self._negatives.of(prompts[0], encode)

    def _encode_padded(self, prompts: list[str]) -> Array:
        """Returns the rows of negative prompts and of their padding, as `_encode_negative` does."""

        def encode(prompts):
            tokenizer, rows = self.checkpoint.tokenizer, self.checkpoint.text_rows
            found = tokenize(tokenizer, prompts, rows, None, fixed_width=True)
            inputs = self._place.spread(found.tokens), self._place.spread(found.mask)
            with self._place.context():
                module, params = self.text_encoder, self.params["text_encoder"]
                return programs.encode_padded(module, params, *inputs)[: len(prompts)]

        if len(set(prompts)) > 1:
            return encode(prompts)
        return self._negatives.of((prompts[0], "padded"), partial(encode, prompts[:1]))
