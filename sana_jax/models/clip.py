"""CLIP (arXiv 2103.00020, section 2.4): pictures and texts as vectors of one space.

Letters: B batch, N tokens, C width, H heads, D head width, E width of the shared space.

    layer:   x += Attention(norm(x));  x += MLP(norm(x))
    picture: patches and a class token, + positions, norm, layers; norm(class token) P
    text:    tokens + positions, causal layers; norm(the end's token) P

It serves the CLIP score, CMMD and the scores of captions. Networks with attention pooling (the
ResNets) and those whose text ends elsewhere (SigLIP) are not implemented.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from sana_jax.kernels.mixed_einsum import einsum_float32
from sana_jax.models.config import MAX_LAYERS, MAX_TOKENS, check_fields
from sana_jax.models.layers import Dtype, dense, partitioned

EPSILON = 1e-5  # of the norms


@dataclasses.dataclass(frozen=True)
class Tower:
    """The transformer of pictures, or that of texts."""

    width: int
    depth: int
    heads: int
    hidden: int  # width inside the MLP

    def __post_init__(self):
        check_fields(self, "CLIP", depth=MAX_LAYERS)
        if self.width % self.heads:
            raise ValueError(f"CLIP heads {self.heads} do not divide the width {self.width}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The architecture of a release; the defaults are OpenAI's ViT-L/14."""

    embedding: int = 768  # E
    vision: Tower = Tower(1024, 24, 16, 4096)
    image_size: int = 224  # pixels a side
    patch_size: int = 14
    text: Tower = Tower(768, 12, 12, 3072)
    context: int = 77  # tokens
    vocab_size: int = 49408
    end_token: int | None = None  # None: the highest token of a text is its end, as OpenAI's is
    quick_gelu: bool = True  # x sigmoid(1.702 x) instead of GELU

    def __post_init__(self):
        check_fields(
            self, "CLIP", vocab_size=2**21, end_token=2**21, context=MAX_TOKENS, image_size=2**14
        )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIP patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Layer(nn.Module):
    """A pre-norm layer, with the signature that nn.scan requires."""

    tower: Tower
    quick_gelu: bool
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], mask: Bool[Array, "N N"] | None
    ) -> tuple[Float[Array, "B N C"], None]:
        tower, types = self.tower, dict(dtype=self.dtype, param_dtype=self.param_dtype)

        # Attention; the mask is True where a row sees a column.
        h = _norm(self, "norm1")(x)
        qkv = dense(3 * tower.width, ("embed", "heads"), name="qkv", **types)(h)
        q, k, v = rearrange(qkv, "b n (t h d) -> t b n h d", t=3, h=tower.heads)
        logits = einsum_float32("bnhd,bmhd->bhnm", q * (q.shape[-1] ** -0.5), k)
        logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        h = einsum_float32("bhnm,bmhd->bnhd", weights, v).astype(self.dtype)
        h = rearrange(h, "b n h d -> b n (h d)")
        x = x + dense(tower.width, ("heads", "embed"), name="out", **types)(h)

        h = dense(tower.hidden, ("embed", "mlp"), name="expand", **types)(_norm(self, "norm2")(x))
        h = h * jax.nn.sigmoid(1.702 * h) if self.quick_gelu else jax.nn.gelu(h, approximate=False)
        return x + dense(tower.width, ("mlp", "embed"), name="contract", **types)(h), None


def _norm(module: nn.Module, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(EPSILON, dtype=module.dtype, param_dtype=module.param_dtype, name=name)


class Transformer(nn.Module):
    """The layers of one tower."""

    tower: Tower
    quick_gelu: bool
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], mask: Bool[Array, "N N"] | None = None
    ) -> Float[Array, "B N C"]:
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.tower.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.tower, self.quick_gelu, self.dtype, self.param_dtype, name="layers")
        return layers(x, mask)[0]


class VisionTower(nn.Module):
    """Maps pictures to the shared space."""

    config: CLIPConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B E"]:
        config, tower = self.config, self.config.vision
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        linear = dict(use_bias=False, **types)
        size = config.patch_size
        x = rearrange(pixels, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)
        x = dense(tower.width, (None, "embed"), name="patch_embed", **linear)(x.astype(self.dtype))
        first = _table(self, "class_token", 1, tower.width)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], *first.shape)), x], axis=1)
        x = x + _table(self, "positions", config.patches + 1, tower.width)
        x = _norm(self, "first_norm")(x)
        x = Transformer(tower, config.quick_gelu, name="transformer", **types)(x)
        x = _norm(self, "last_norm")(x[:, 0])
        return dense(config.embedding, ("embed", None), name="project", **linear)(x)


class TextTower(nn.Module):
    """Maps texts to the shared space."""

    config: CLIPConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B N"]) -> Float[Array, "B E"]:
        config, tower = self.config, self.config.text
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        table = partitioned(nn.initializers.normal(0.02), ("vocab", "embed"))
        embed = nn.Embed(
            config.vocab_size, tower.width, embedding_init=table, name="embed", **types
        )
        x = embed(tokens)
        x = x + _table(self, "positions", config.context, tower.width)[: x.shape[1]]
        causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        x = Transformer(tower, config.quick_gelu, name="transformer", **types)(x, causal)
        is_end = tokens if config.end_token is None else tokens == config.end_token
        end = jnp.argmax(is_end, axis=-1)  # the first, where padding repeats it
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = _norm(self, "last_norm")(x)
        return dense(config.embedding, ("embed", None), use_bias=False, name="project", **types)(x)


def _table(module: nn.Module, name: str, rows: int, width: int) -> Float[Array, "rows C"]:
    init = partitioned(nn.initializers.normal(0.02), (None, "embed"))
    return module.param(name, init, (rows, width), module.param_dtype).astype(module.dtype)


class CLIP(nn.Module):
    """Both towers. Their results are not of length one: see `unit`."""

    config: CLIPConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.vision = VisionTower(self.config, **types)
        self.text = TextTower(self.config, **types)

    def encode_image(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B E"]:
        """`pixels` are normalised by the checkpoint's mean and spread."""
        return self.vision(pixels)

    def encode_text(self, tokens: Int[Array, "B N"]) -> Float[Array, "B E"]:
        """Any token may follow a text's end."""
        return self.text(tokens)

    def __call__(self, pixels, tokens):
        return self.encode_image(pixels), self.encode_text(tokens)


def unit(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Returns vectors of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
