"""The Gemma-2 decoder (arXiv 2408.00118, section 2) as SANA's text encoder.

Letters: B batch, L tokens, C width, H query heads, K key-value heads, G = H / K, D head width.

    x = embedding[token] * sqrt(C)
    layer:  x += norm(Attention(norm(x)));  x += norm(FFN(norm(x)))       four RMS norms
    output: norm(x), after the last layer; there is no language-model head

A token sees itself and the tokens before it, in sliding layers only the last `sliding_window`. So
padding on the right changes no row of a text, and needs no mask; and the keys and values of a
beginning that many texts share are computed once (`read_prefix`). Generation and RoPE scaling are
not implemented.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sana_jax.kernels.mixed_einsum import einsum_float32
from sana_jax.models.config import (
    MAX_LAYERS,
    MAX_TOKENS,
    Layers,
    check_fields,
    check_width,
    later,
)
from sana_jax.models.layers import Dtype, Embed, RMSNorm, dense, scan_for_sampling
from sana_jax.sharding import constrain

_MOST = {
    "vocab_size": 2**21,  # the largest vocabularies have 2**18
    "num_layers": MAX_LAYERS,
    "query_pre_attn_scalar": MAX_TOKENS,
    "sliding_window": MAX_TOKENS,
    "max_positions": MAX_TOKENS,
}


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """The architecture of a release; the defaults are gemma-2-2b."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_layers: int = 26
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: int = 256  # attention logits are divided by its square root
    attn_logit_softcap: float | None = 50.0
    sliding_window: int | None = 4096  # tokens that a sliding layer sees; None: no layer slides
    sliding_layers: tuple[bool, ...] | None = None  # None: layers 0, 2, 4, ...
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_positions: int = 8192  # that the release was trained for; no array has this size
    quantised: Layers = later((), repr=False)  # see quantisation/table.py

    def __post_init__(self):
        check_fields(self, "text encoder", **_MOST)
        check_width("text encoder", "num_heads x head_dim", self.num_heads * self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and RoPE turns pairs")
        if self.sliding_layers is not None and len(self.sliding_layers) != self.num_layers:
            raise ValueError(f"sliding_layers does not name each of {self.num_layers} layers")

    @property
    def slides(self) -> tuple[bool, ...]:
        """True for each layer that has the sliding window."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        if self.sliding_layers is None:
            return tuple(i % 2 == 0 for i in range(self.num_layers))
        return self.sliding_layers


class Prefix(NamedTuple):
    """The keys and values of a beginning of P tokens, for the rows after it, and its first row."""

    first: Float[Array, "1 C"]
    keys: Float[Array, "layers 1 P K D"]  # rotated by RoPE
    values: Float[Array, "layers 1 P K D"]


Angles = Float[Array | np.ndarray, "L D2"]  # cosines or sines, of D / 2 pairs


def rope_table(length: int, config: Gemma2Config) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines and sines of position * theta^(-2i / D), (length, D / 2) each, in float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** exponents
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None]
    return np.cos(angles), np.sin(angles)


def rotate(x: Float[Array, "B L H D"], cos: Angles, sin: Angles) -> Float[Array, "B L H D"]:
    """Rotates the pairs (x_i, x_{i + D/2}) by their angles, in float32 (RoPE)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B L H D"],
    k: Float[Array, "B M K D"],
    v: Float[Array, "B M K D"],
    mask: Bool[Array, "#B L M"],
    config: Gemma2Config,
) -> Float[Array, "B L C"]:
    """Computes grouped-query attention, softmax in float32.

    `mask` is True where row L sees row M. A row that sees none gets the mean of all, as in
    transformers: padding further from its text than the window.
    """
    q = rearrange(q, "b l (k g) d -> b l k g d", k=config.num_kv_heads)
    logits = einsum_float32("blkgd,bmkd->bkglm", q, k)
    logits = logits * config.query_pre_attn_scalar**-0.5
    if config.attn_logit_softcap is not None:
        logits = config.attn_logit_softcap * jnp.tanh(logits / config.attn_logit_softcap)
    # After the cap, which would make any number small.
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = einsum_float32("bkglm,bmkd->blkgd", weights, v).astype(v.dtype)
    return rearrange(out, "b l k g d -> b l (k g d)")


class Layer(nn.Module):
    """Attention and the gated feed-forward network, with the signature that nn.scan requires."""

    config: Gemma2Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L C"],
        slides: Bool[Array, ""],
        before: tuple[Array, Array] | None,
        cos: Angles,
        sin: Angles,
        visible: Bool[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L C"], tuple[Array, Array]]:
        """Returns x after this layer, and x's own keys and values.

        `before` holds the keys and values of the rows before x; `slides` says whether this layer
        has the sliding window; `visible` is False for rows of x that none sees.
        """
        config = self.config
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

        def linear(features, axes, name):
            return dense(features, axes, use_bias=False, name=name, **types)

        def norm(name):
            return RMSNorm(config.rms_norm_eps, zero_centered=True, name=name, **types)

        def heads(x, count, name):
            x = linear(count * config.head_dim, ("embed", "heads"), name)(x)
            # Else XLA's TPU backend transposes these weights of all layers first, for heads as the
            # rotation likes them to lie: 8 of 36 million cycles for a prompt, by its estimate. A
            # GPU's does not, and would launch more kernels.
            barrier = jax.lax.optimization_barrier
            x = jax.lax.platform_dependent(x, tpu=barrier, default=lambda x: x)
            return rearrange(x, "b l (h d) -> b l h d", h=count)

        # Attention.
        x = constrain(x, "batch", None, "residual")
        h = norm("input_norm")(x)
        q = rotate(heads(h, config.num_heads, "q"), cos, sin)
        k = rotate(heads(h, config.num_kv_heads, "k"), cos, sin)
        v = heads(h, config.num_kv_heads, "v")
        own = k, v
        if before is not None:
            k, v = (_after(first, rest) for first, rest in zip(before, own, strict=True))
        mask = self._mask(x.shape[1], k.shape[1], slides)[None]
        if visible is not None:
            mask &= jnp.pad(visible, ((0, 0), (k.shape[1] - x.shape[1], 0)), constant_values=True)[
                :, None
            ]
        h = attend(q, k, v, mask, config)
        h = linear(config.hidden_size, ("heads", "embed"), "o")(h)
        x = x + norm("post_attention_norm")(h)

        # Feed-forward, gated by GELU.
        h = norm("pre_ffn_norm")(x)
        gate = linear(config.intermediate_size, ("embed", "mlp"), "gate")(h)
        gate = jax.nn.gelu(gate.astype(jnp.float32), approximate=True).astype(self.dtype)
        h = gate * linear(config.intermediate_size, ("embed", "mlp"), "up")(h)
        h = linear(config.hidden_size, ("mlp", "embed"), "down")(h)
        x = x + norm("post_ffn_norm")(h)
        return constrain(x, "batch", None, "residual"), own

    def _mask(self, length: int, end: int, slides: Bool[Array, ""]) -> Bool[Array, "L M"]:
        """Returns the causal mask of the last `length` of `end` rows over all `end` columns."""
        behind = np.arange(end - length, end)[:, None] - np.arange(end)[None]
        window = self.config.sliding_window
        near = behind < (end if window is None else window)
        return jnp.where(slides, near & (behind >= 0), behind >= 0)


def _after(first: Float[Array, "1 P K D"], rest: Float[Array, "B L K D"]) -> Array:
    """Prepends the one beginning to every text of the batch."""
    first = jnp.broadcast_to(first, (rest.shape[0], *first.shape[1:]))
    return jnp.concatenate([first, rest], axis=1)


class Gemma2(nn.Module):
    """Maps tokens to the hidden states that SANA reads, after the final norm, in `dtype`."""

    config: Gemma2Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    trains: bool = False  # for gradients, with which scan_for_sampling would waste memory
    unroll: int = 1  # layers in one iteration of the loop, if it trains

    def setup(self):
        config = self.config
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.embed = Embed(config.vocab_size, config.hidden_size, param_dtype=self.param_dtype)
        self.layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, **types)
        self.final_norm = RMSNorm(config.rms_norm_eps, zero_centered=True, **types)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        prefix: Prefix | None = None,
        visible: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L C"]:
        """Returns the rows of `tokens`, which follow those of `prefix`.

        Any tokens may pad a text on the right; the rows of padding have no meaning, unless
        `visible` is False there: then they are transformers', which reads only the text for them.
        """
        return self._read(tokens, prefix, visible)[0]

    def read_prefix(self, tokens: Int[Array, "1 P"]) -> Prefix:
        """Returns the part of the computation that texts beginning with these tokens share."""
        rows, keys_values = self._read(tokens, None, None)
        return Prefix(rows[:, 0], *keys_values)

    def _read(self, tokens, prefix, visible):
        before = prefix and (prefix.keys, prefix.values)
        start = prefix.keys.shape[2] if prefix else 0
        x = self.embed(tokens)
        # In the weights' dtype: the released networks were trained with a root rounded to it.
        x = (x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)).astype(self.dtype)
        cos, sin = rope_table(start + tokens.shape[1], self.config)
        slides = jnp.asarray(self.config.slides)
        each, shared = (slides, before), (cos[start:], sin[start:], visible)
        if self.trains:
            x, keys_values = self.layers(x, *each, *shared)
        else:
            layer = Layer(self.config, self.dtype, self.param_dtype, parent=None)
            x, keys_values = scan_for_sampling(self.layers, layer, "__call__", x, each, *shared)
        return self.final_norm(x), keys_values
