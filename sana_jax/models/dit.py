"""SANA's linear diffusion transformer (arXiv 2410.10629, section 2.3).

Letters: B batch, h w c latents, N = H W tokens (one a patch), L text rows of width T, C width,
D head width.

Block i, with a learned table S_i of six C-vectors and t0 = modulation(timestep), shared by all
blocks (adaLN-single); LN is a layer norm without weights:

    shift1, scale1, gate1, shift2, scale2, gate2 = S_i + t0
    x += gate1 * LinearAttention(LN(x) (1 + scale1) + shift1)
    x += CrossAttention(x, caption)                              no norm, no gate
    x += gate2 * MixFFN(LN(x) (1 + scale2) + shift2)

Attention is linear in N, the depthwise convolution of Mix-FFN tells tokens where they are, and
only the 2048 and 4096 px models add positions. Sprint (arXiv 2503.09641) is this network with the
guidance scale as a further input. ControlNet is not implemented. For ablations there are the parts
that SANA replaced (variants.py) and the objective of DDPM.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from sana_jax.diffusion import ddpm
from sana_jax.diffusion.flow import NUM_TIMESTEPS
from sana_jax.kernels.cross_attention import cross_attention
from sana_jax.kernels.int8_block import int8_block, takes
from sana_jax.kernels.linear_attention import linear_attention
from sana_jax.kernels.modulated_norm import modulated_norm, reference
from sana_jax.models.config import (
    MAX_LAYERS,
    Layers,
    check_choices,
    check_fields,
    check_width,
    later,
)
from sana_jax.models.embedders import CaptionEmbedder, TimestepEmbedder, position_features
from sana_jax.models.layers import (
    Dtype,
    GLUMBConv,
    RMSNorm,
    dense,
    partitioned,
    scan_for_sampling,
)
from sana_jax.models.remat import REMAT, remat_scan
from sana_jax.models.variants import MLP, softmax_attention
from sana_jax.sharding import check_tokens, constrain

FLOAT16_MAX = 65504.0

# A sample of 2**14 latents is a picture of half a million pixels a side.
_MOST = {"depth": MAX_LAYERS, "patch_size": 64, "sample_size": 2**14}
# The first of each is SANA's own, and the only one that files of others can hold.
VARIANTS = {
    "attention": ("linear", "softmax"),
    "ffn": ("glumbconv", "mlp"),
    "objective": ("flow", "ddpm"),
}


@dataclasses.dataclass(frozen=True)
class SanaConfig:
    """The architecture of a release; the defaults are Sana 1.6B at 1024 px."""

    latent_channels: int = 32
    depth: int = 20
    width: int = 2240
    head_dim: int = 32  # of the linear attention
    cross_heads: int = 20
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    patch_size: int = 1
    sample_size: int = 32  # side of the native latent
    interpolation_scale: float | None = None  # of the sincos positions; None: no positions
    qk_norm: bool = False
    attention_bias: bool = False  # of the linear attention's q, k and v
    timestep_scale: float = 1.0  # a sampler multiplies timesteps by it
    # True clips the linear attention's output to float16's range, on which weights trained in
    # float16 rely. None clips only if activations are float16, as diffusers does.
    clip_attention: bool | None = None
    # For ablations; see VARIANTS.
    attention: str = later("linear")  # of tokens to tokens
    ffn: str = later("glumbconv")
    objective: str = later("flow")  # of the training; the network gives the flow's velocity anyway
    # Sprint's network embeds the guidance scale times this, and is drawn from in a few steps by SCM
    # (diffusion/scm.py). None: the network does not know of guidance.
    guidance_embedding: float | None = later(None)
    quantised: Layers = later((), repr=False)  # see quantisation/table.py

    def __post_init__(self):
        check_fields(self, "transformer", **_MOST)
        check_choices(self, "transformer", VARIANTS)
        check_width("transformer", "width x mlp_ratio", int(self.width * self.mlp_ratio))
        check_width(
            "transformer",
            "patch_size^2 x latent_channels",
            self.patch_size**2 * self.latent_channels,
        )
        if self.sample_size < self.patch_size:
            raise ValueError(f"transformer sample_size {self.sample_size} is less than a patch")
        if self.width % self.head_dim or self.width % self.cross_heads:
            raise ValueError(f"transformer width {self.width} does not divide into its heads")

    @property
    def is_sprint(self) -> bool:
        """True for a network that was distilled to draw in a few steps, without a second half."""
        return self.guidance_embedding is not None

    def variants(self) -> dict[str, str]:
        """Returns the fields of VARIANTS that are not SANA's own."""
        values = {name: getattr(self, name) for name in VARIANTS}
        return {name: value for name, value in values.items() if value != VARIANTS[name][0]}


_600M = SanaConfig(depth=28, width=1152, cross_heads=16)
_1600M = SanaConfig()
_replace = dataclasses.replace
# Sprint's own: times of 0 .. 1, and 0.1 times the guidance scale.
SPRINT = dict(qk_norm=True, timestep_scale=1 / NUM_TIMESTEPS, guidance_embedding=0.1)
PRESETS = {
    "sana_600m_512": _replace(_600M, sample_size=16),
    "sana_600m_1024": _600M,
    "sana_1600m_512": _replace(_1600M, sample_size=16),
    "sana_1600m_1024": _1600M,
    "sana_1600m_2048": _replace(_1600M, sample_size=64, interpolation_scale=1.0),
    "sana_1600m_4096": _replace(_1600M, sample_size=128, interpolation_scale=2.0),
    "sana1.5_1600m_1024": _replace(_1600M, qk_norm=True),
    "sana1.5_4800m_1024": _replace(_1600M, qk_norm=True, depth=60),
    "sana_sprint_600m_1024": _replace(_600M, **SPRINT),
    "sana_sprint_1600m_1024": _replace(_1600M, **SPRINT),
}


class SelfAttention(nn.Module):
    """ReLU linear attention of every token to every other (section 2.3), or softmax attention."""

    config: SanaConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"  # see kernels/dispatch.py

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        config, width = self.config, self.config.width
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        bias = config.attention_bias
        qkv = dense(3 * width, ("embed", "heads"), use_bias=bias, name="qkv", **types)(x)
        if config.qk_norm:  # over the whole width, before the split into heads
            q, k, v = jnp.split(qkv, 3, axis=-1)
            q = RMSNorm(1e-5, name="q_norm", **types)(q)
            k = RMSNorm(1e-5, name="k_norm", **types)(k)
            qkv = jnp.concatenate([q, k, v], axis=-1)
        if config.attention == "softmax":
            out = softmax_attention(qkv, config.head_dim)
        else:
            out = linear_attention(qkv, config.head_dim, implementation=self.implementation)
        out = dense(width, ("heads", "embed"), name="out", **types)(out)
        clip = config.clip_attention
        if clip is None:
            clip = jnp.dtype(self.dtype) == jnp.float16
        return jnp.clip(out, -FLOAT16_MAX, FLOAT16_MAX) if clip else out


class CrossAttention(nn.Module):
    """Softmax attention of tokens to text rows; the timestep does not change keys and values."""

    config: SanaConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"  # see kernels/dispatch.py

    def setup(self):
        width = self.config.width
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.q = dense(width, ("embed", "heads"), **types)
        self.kv = dense(2 * width, ("embed", "heads"), **types)
        self.out = dense(width, ("heads", "embed"), **types)
        if self.config.qk_norm:
            self.q_norm = RMSNorm(1e-5, **types)
            self.k_norm = RMSNorm(1e-5, **types)

    def keys_values(self, caption: Float[Array, "B L C"]) -> Float[Array, "B L C2"]:
        """Returns the keys and values of the text rows, side by side."""
        kv = self.kv(caption)
        if self.config.qk_norm:
            k, v = jnp.split(kv, 2, axis=-1)
            kv = jnp.concatenate([self.k_norm(k), v], axis=-1)
        return kv

    def __call__(self, x: Float[Array, "B N C"], keys_values, mask: Bool[Array, "B L"]):
        """Returns (B, N, C); `keys_values` is (B, L, 2 C), `mask` False for rows to ignore."""
        config, q = self.config, self.q(x)
        if config.qk_norm:
            q = self.q_norm(q)
        out = cross_attention(q, keys_values, mask, config.cross_heads, self.implementation)
        return self.out(out)


class Block(nn.Module):
    """One layer; the head of this file has the formulas. The signatures are those of nn.scan."""

    config: SanaConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"  # see kernels/dispatch.py

    def setup(self):
        config = self.config
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        table_init = nn.initializers.normal(config.width**-0.5)
        self.modulation_table = self.param(
            "modulation_table",
            partitioned(table_init, (None, "embed")),
            (6, config.width),
            self.param_dtype,
        )
        options = dict(implementation=self.implementation, **types)
        self.attention = SelfAttention(config, **options)
        self.cross_attention = CrossAttention(config, **options)
        hidden = int(config.mlp_ratio * config.width)
        if config.ffn == "mlp":
            self.ffn = MLP(hidden, **types)
        else:
            self.ffn = GLUMBConv(hidden, split_rows=True, **options)

    def keys_values(self, carry, caption):
        """Returns the keys and values of the text, which sampling computes once a prompt."""
        return carry, self.cross_attention.keys_values(caption)

    def with_keys_values(self, x, keys_values, modulation, mask):
        """Returns x after this block; x is (B, H, W, C), modulation (B or 1, 6, C) in float32."""
        config, params = self.config, nn.unbox(self.variables.get("params", {}))
        usual = (config.attention, config.ffn) == ("linear", "glumbconv")
        fits = dict(head_dim=config.head_dim, implementation=self.implementation)
        if config.clip_attention or not usual or not takes(params, x, mask.shape[1], **fits):
            return self.plain(x, keys_values, modulation, mask)
        alone = self.clone(parent=None)

        def plain(params, *args):
            return alone.apply({"params": params}, *args, method="plain")[0]

        x = checkpoint_name(constrain(x, "batch", "tokens", None, "residual"), "block_input")
        heads = dict(head_dim=config.head_dim, cross_heads=config.cross_heads)
        x = int8_block(plain, params, x, keys_values, modulation, mask, **heads)
        return constrain(x, "batch", "tokens", None, "residual"), None

    def plain(self, x, keys_values, modulation, mask):
        """Computes `with_keys_values` operation by operation."""
        _, height, width, _ = x.shape
        x = rearrange(x, "b h w c -> b (h w) c")
        x = checkpoint_name(constrain(x, "batch", "tokens", "residual"), "block_input")
        # The gates, and with them the rest of the modulation, are float32.
        table = self.modulation_table.astype(jnp.float32)[None] + modulation  # (B or 1, 6, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(table, 6, axis=1)

        def gated(gate, branch):
            return (gate * branch.astype(jnp.float32)).astype(self.dtype)

        x, h = modulated_norm(x, shift1, scale1, self.implementation)
        x = x + gated(gate1, self.attention(h))
        x = x + self.cross_attention(x, keys_values, mask)
        # Mix-FFN convolves, so it needs the image again.
        pair = modulated_norm(x, shift2, scale2, self.implementation)
        x, h = (rearrange(t, "b (h w) c -> b h w c", h=height, w=width) for t in pair)
        x = x + self.ffn(h, gate2[:, None])
        return constrain(x, "batch", "tokens", None, "residual"), None

    def __call__(self, x, modulation, caption, mask):
        keys_values = self.cross_attention.keys_values(caption)
        return self.with_keys_values(x, keys_values, modulation, mask)


class SanaTransformer(nn.Module):
    """The network that predicts the velocity of a noisy latent.

    `__call__` computes everything; samplers call `keys_values` once a prompt and `denoise` once a
    step, which gives the same numbers.
    """

    config: SanaConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: str = "none"  # a key of REMAT, in remat.py
    unroll: int = 1  # blocks in one iteration of the loop of `__call__`
    implementation: str = "auto"  # of the operations that have a kernel: see kernels/dispatch.py

    def setup(self):
        config = self.config
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.patch_embed = dense(config.width, (None, "embed"), **types)
        self.time_embed = TimestepEmbedder(config.width, param_dtype=self.param_dtype)
        self.caption_embed = CaptionEmbedder(config.width, **types)

        # All blocks are one scan over their stacked weights.
        every, once = 0, nn.broadcast  # an argument of each layer, or the same for all
        scan = dict(
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        block = Block
        if policy := REMAT[self.remat]:
            # Without a loop, XLA would merge the recomputed activations with the first ones.
            block = nn.remat(Block, prevent_cse=self.unroll >= config.depth, policy=policy)
        self.blocks = nn.scan(
            block,
            methods={
                "__call__": {"in_axes": (once, once, once), "unroll": self.unroll, **scan},
                "keys_values": {"in_axes": (once,), **scan},
                "with_keys_values": {"in_axes": (every, once, once), **scan},
            },
        )(config, implementation=self.implementation, **types)

        # The output: a modulated norm and a projection to the pixels of a patch.
        self.final_table = self.param(
            "final_table",
            partitioned(nn.initializers.normal(config.width**-0.5), (None, "embed")),
            (2, config.width),
            self.param_dtype,
        )
        channels = config.patch_size**2 * config.latent_channels
        self.proj_out = dense(channels, ("embed", None), **types)

    def keys_values(self, caption: Float[Array, "B L T"]) -> Float[Array, "depth B L C2"]:
        """Returns the cross-attention keys and values of all blocks, side by side."""
        return self._scan("keys_values", (), (), self.caption_embed(caption))[1]

    def denoise(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " #B"],
        keys_values: Float[Array, "depth B L C2"] | dict[str, Array | tuple[Array, Array]],
        mask: Bool[Array, "B L"],
        guidance: Float[Array, " #B"] | None = None,
    ) -> Float[Array, "B h w c"]:
        """Computes `__call__` from `keys_values(caption)` in place of the caption.

        If the blocks' weights were taken apart (layers.unstack), `keys_values` are too, a layer's
        in one array or as a pair.
        """

        def blocks(x, modulation):
            return self._scan("with_keys_values", x, (keys_values,), modulation, mask)

        return self._velocity(latents, timestep, guidance, blocks)

    def __call__(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " #B"],
        caption: Float[Array, "B L T"],
        mask: Bool[Array, "B L"],
        guidance: Float[Array, " #B"] | None = None,
    ) -> Float[Array, "B h w c"]:
        """Returns the velocity noise - data, in float32.

        `timestep` is on the scale 0 .. 1000 (times `timestep_scale`) and used as given; one value
        serves a whole batch. `caption` holds the text encoder's rows, `mask` is False for the rows
        to ignore. `guidance` is the guidance scale, for Sprint's networks and no others (else
        ValueError). Raises UserError if the mesh does not divide the rows of tokens.
        """
        caption = self.caption_embed(caption)

        def blocks(x, modulation):
            if self.remat == "full" and self.unroll == 1 and not self.is_initializing():
                return self._rematerialised(x, modulation, caption, mask)
            return self.blocks(x, modulation, caption, mask)

        return self._velocity(latents, timestep, guidance, blocks)

    def _rematerialised(self, x, *shared):
        """Computes `blocks`, whose gradients are faster so than with nn.remat (remat.py)."""
        layer = self._layer()

        def run(x, own, *shared):
            params, rngs = own
            return layer.apply({"params": params}, x, *shared, rngs=rngs)[0]

        rngs = {}
        if self.has_rng("dropout"):
            rngs["dropout"] = jax.random.split(self.make_rng("dropout"), self.config.depth)
        own = nn.unbox(self.blocks.variables["params"]), rngs
        return remat_scan(run, x, own, *shared), None

    def _scan(self, method, *arguments, block=None, layers=slice(None)):
        return scan_for_sampling(self.blocks, self._layer(block), method, *arguments, layers=layers)

    def _layer(self, block=None):
        options = self.dtype, self.param_dtype, self.implementation
        return (block or Block)(self.config, *options, parent=None)

    def _velocity(self, latents, timestep, guidance, blocks):
        if self.config.objective == "flow":
            return self._predict(latents, timestep, guidance, blocks)
        scale = self.config.timestep_scale

        def noise_of(x, timestep):
            return self._predict(x, timestep * scale, guidance, blocks)

        return ddpm.velocity(noise_of, latents, timestep / (NUM_TIMESTEPS * scale))

    def _predict(self, latents, timestep, guidance, blocks):
        config, patch = self.config, self.config.patch_size
        if config.is_sprint == (guidance is None):
            raise ValueError("a guidance scale is an input of Sprint's networks, and of no others")
        # Patches to tokens, (B, H, W, C).
        x = rearrange(latents, "b (h p) (w q) c -> b h w (c p q)", p=patch, q=patch)
        if not self.is_initializing():
            check_tokens(*x.shape[1:3])
        x = constrain(self.patch_embed(x), "batch", "tokens", None, "residual")
        if config.interpolation_scale is not None:
            x = x + self._positions(*x.shape[1:3]).astype(x.dtype)
        if guidance is not None:
            guidance = guidance * config.guidance_embedding
        embedding, modulation = self.time_embed(timestep, guidance)
        x, _ = blocks(x, modulation)

        # Tokens to patches of velocity; the channel is the fastest here, and the slowest above.
        height = x.shape[1]
        x = rearrange(x, "b h w c -> b (h w) c")
        table = self.final_table.astype(jnp.float32)[None] + embedding[:, None]
        shift, scale = jnp.split(table, 2, axis=1)
        x = self.proj_out(reference.modulated_norm(x, shift, scale)).astype(jnp.float32)
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=height, p=patch, q=patch)

    def _positions(self, height: int, width: int) -> Float[Array, "1 h w C"]:
        """Returns x's features in the first half of the channels, y's in the second."""
        config = self.config
        base, half = config.sample_size // config.patch_size, config.width // 2
        scale = config.interpolation_scale
        x = jnp.asarray(position_features(width, base, scale, half))
        y = jnp.asarray(position_features(height, base, scale, half))
        shape = (height, width, half)
        x, y = jnp.broadcast_to(x[None], shape), jnp.broadcast_to(y[:, None], shape)
        return jnp.concatenate([x, y], axis=-1)[None]
