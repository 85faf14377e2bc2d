"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733), with SANA's changes (2410.10629).

Letters: B batch, H W pixels, h w sides and c channels of the latents, C channels of a stage.

Stage i of either half works at 1 / 2^i of the resolution. Between two stages, a convolution learns
only the residual of a rearrangement of the pixels without weights (residual autoencoding):

    down: y = convolution(x) + average(space_to_channel(x))
    up:   y = convolution(x) + channel_to_space(duplicate(x))

where groups of consecutive channels are averaged, or single channels duplicated, to the width of y.
The same shortcut joins the deepest stage to the latents. A stage is a stack of one kind of block;
the norm comes last in every branch, and the residual stream is not normalised:

    ResBlock:           x += Norm(conv(act(conv(x))))
    EfficientViTBlock:  x += Norm(LinearAttention(x));  x += Norm(MixFFN(x))

There is no KL term and no sampling: the encoder returns the latents themselves. They are unscaled;
the diffusion model works on `latents * config.scaling_factor`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.kernels import image_head, res_block
from sana_jax.kernels import upsample as upsampling
from sana_jax.kernels.multiscale_attention import multiscale_attention
from sana_jax.kernels.multiscale_attention.reference import Scale
from sana_jax.kernels.res_block.reference import EPSILON  # of every norm
from sana_jax.kernels.upsample.reference import channel_to_space, duplicate
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.layers import (
    Conv3x3,
    Dtype,
    GLUMBConv,
    RMSNorm,
    dense,
    fan_in_uniform,
    partitioned,
)
from sana_jax.sharding import constrain

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu}


def space_to_channel(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 4*C"]:
    """Packs 2 x 2 pixels into one, in torch's order: channel slowest, then row, then column."""
    return rearrange(x, "b (h p) (w q) c -> b h w (c p q)", p=2, q=2)


def average(x: Float[Array, "B H W C"], channels: int) -> Float[Array, "B H W c"]:
    """Returns the means of `channels` groups of consecutive channels."""
    return reduce(x, "b h w (c g) -> b h w c", "mean", c=channels)


def downsample(
    x: Float[Array, "B H W C"], channels: int, kind: str, *, shortcut: bool = True, **conv: Any
) -> Float[Array, "B H//2 W//2 D"]:
    """Halves the resolution, inside a module's `__call__`; D = channels, `conv` as for Conv3x3."""
    if kind == "conv":
        y = Conv3x3(channels, stride=2, **conv)(x)
    else:
        y = space_to_channel(Conv3x3(channels // 4, **conv)(x))
    return y + average(space_to_channel(x), channels) if shortcut else y


def upsample(
    x: Float[Array, "B H W C"], channels: int, kind: str, *, shortcut: bool = True, **conv: Any
) -> Float[Array, "B 2*H 2*W D"]:
    """Doubles the resolution, inside a module's `__call__`; D = channels, `conv` as for Conv3x3."""
    if kind == "interpolate":
        layer = Conv3x3(channels, double=True, **conv)
        if shortcut and upsampling.uses_kernel(x.shape, channels, layer.dtype, "auto"):
            return upsampling.upsample(x.astype(layer.dtype), *layer.weights(x.shape[-1]))
        y = layer(x)
    else:
        y = channel_to_space(Conv3x3(4 * channels, **conv)(x))
    return y + channel_to_space(duplicate(x, 4 * channels)) if shortcut else y


def split_batch(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Keeps activations on their images' devices; the compiler would move them to the weights.

    Where the mesh splits tokens, their rows are split too: convolutions exchange those that meet.
    """
    return constrain(x, "batch", "tokens", None, "residual")


class BatchNorm(nn.Module):
    """Batch norm for inference: the stored statistics are constants."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        def vector(name, init):
            init = partitioned(init, ("embed",))
            value = self.param(name, init, x.shape[-1:], self.param_dtype)
            return value.astype(jnp.float32)[None, None, None]

        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale, bias = vector("scale", ones), vector("bias", zeros)
        mean, var = jax.lax.stop_gradient((vector("mean", zeros), vector("var", ones)))
        x = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(var + EPSILON)
        return (x * scale + bias).astype(self.dtype)


def make_norm(kind: str, **fields: Any) -> nn.Module:
    """Returns the norm that a config calls `kind`."""
    if kind == "batch_norm":
        return BatchNorm(**fields)
    return RMSNorm(EPSILON, use_bias=True, **fields)


class ResBlock(nn.Module):
    """x + Norm(conv(act(conv(x)))), with the signature that nn.scan requires."""

    norm: str = "rms_norm"
    activation: str = "silu"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    implementation: str = "auto"  # see kernels/dispatch.py

    def uses_kernel(self, x: Float[Array, "B H W C"]) -> bool:
        """Returns True if a kernel computes the whole block."""
        known = (self.norm, self.activation) == ("rms_norm", "silu")
        return known and res_block.uses_kernel(x.shape, self.dtype, self.implementation)

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        width, types = x.shape[-1], dict(dtype=self.dtype, param_dtype=self.param_dtype)
        # By the kernel, on the weights of the modules below.
        if self.uses_kernel(x) and not self.is_initializing():
            stored = nn.unbox(self.variables["params"])
            conv1, conv2, norm = stored["conv1"], stored["conv2"], stored["norm"]
            convs = (
                w.astype(self.dtype) for w in (conv1["kernel"], conv1["bias"], conv2["kernel"])
            )
            y = res_block.res_block(x.astype(self.dtype), *convs, norm["scale"], norm["bias"])
            return split_batch(y), None
        # By modules, which also make the weights.
        y = Conv3x3(width, ("embed", "mlp"), name="conv1", **types)(x)
        y = ACTIVATIONS[self.activation](y)
        y = Conv3x3(width, ("mlp", "embed"), use_bias=False, name="conv2", **types)(y)
        return split_batch(x + make_norm(self.norm, name="norm", **types)(y)), None


class Multiscale(nn.Module):
    """The weights of EfficientViT's multi-scale tokens: see kernels/multiscale_attention.

    `size` is the side of the neighbourhood over which q, k and v of `width` channels are mixed.
    """

    size: int
    width: int
    head_dim: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Scale:
        """Returns the depthwise and the grouped kernel."""
        uniform = nn.initializers.variance_scaling
        depthwise_kernel = self.param(
            "depthwise_kernel",
            partitioned(uniform(1 / 3, "fan_in", "uniform", (0, 1)), (None, None, "heads")),
            (self.size, self.size, self.width),
            self.param_dtype,
        )
        pointwise_kernel = self.param(
            "pointwise_kernel",
            partitioned(uniform(1 / 3, "fan_in", "uniform", batch_axis=0), ("heads", None, None)),
            (self.width // self.head_dim, self.head_dim, self.head_dim),
            self.param_dtype,
        )
        return depthwise_kernel, pointwise_kernel


class EfficientViTBlock(nn.Module):
    """x + Norm(LinearAttention(x)), then x + Norm(MixFFN(x)); the signature is that of nn.scan.

    EfficientViT's module (arXiv 2205.14756) with SANA's feed-forward network. The attention has
    C / head_dim heads, and as many again for each scale.
    """

    head_dim: int
    scales: tuple[int, ...] = ()
    norm: str = "rms_norm"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]):
        width, head_dim = x.shape[-1], self.head_dim
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        linear = dict(use_bias=False, kernel_init=fan_in_uniform, **types)

        # Attention. Channels of qkv are [q | k | v] of the first head, of the second, and so on.
        qkv = dense(3 * width, ("embed", "heads"), name="qkv", **linear)(x)
        scales = tuple(
            Multiscale(size, 3 * width, head_dim, self.param_dtype, name=f"multiscale_{j}")()
            for j, size in enumerate(self.scales)
        )
        y = multiscale_attention(qkv, scales, head_dim)  # (B, H, W, C (1 + scales))
        y = dense(width, ("heads", "embed"), name="out", **linear)(y)
        x = split_batch(x + make_norm(self.norm, name="norm", **types)(y))

        # Feed-forward; its norm is an RMS norm in every release.
        y = GLUMBConv(4 * width, name="ffn", **types)(x)
        return split_batch(x + make_norm("rms_norm", name="ffn_norm", **types)(y)), None


class Stage(nn.Module):
    """Blocks, as one scan over their stacked weights, and a change of resolution.

    A stage of the encoder halves the resolution at its end, a stage of the decoder doubles it at
    its start; the deepest stage of either keeps it.
    """

    config: DCAEConfig
    side: str  # "encoder" or "decoder"
    index: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False  # the backward pass recomputes a block's activations

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        config, i, decoder = self.config, self.index, self.side == "decoder"

        def of_stage(name):
            return getattr(config, f"{self.side}_{name}")[i]

        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        resize = dict(axes=("embed", "mlp"), **types)
        deepest = i + 1 == len(config.encoder_channels)
        if decoder and not deepest:
            x = split_batch(upsample(x, of_stage("channels"), config.upsample, name="up", **resize))

        # The blocks. Only the decoder chooses norms and activations.
        fields = dict(norm=config.decoder_norms[i] if decoder else "rms_norm", **types)
        if of_stage("blocks") == "ResBlock":
            block = ResBlock
            fields |= dict(activation=config.decoder_activations[i] if decoder else "silu")
        else:
            block = EfficientViTBlock
            fields |= dict(head_dim=config.attention_head_dim, scales=of_stage("qkv_multiscales"))
        fused = block is ResBlock and ResBlock(**fields, parent=None).uses_kernel(x)
        if self.remat:
            block = nn.remat(block, prevent_cse=False)  # a scan needs no barrier against CSE
        if layers := of_stage("layers"):
            scan = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=layers,
                unroll=layers if fused else 1,  # a loop copies the result of a kernel
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = scan(name="blocks", **fields)(x)

        if not decoder and not deepest:
            channels = config.encoder_channels[i + 1]
            x = split_batch(downsample(x, channels, config.downsample, name="down", **resize))
        return x


class Encoder(nn.Module):
    """Encodes images in [-1, 1] to unscaled latents, in float32."""

    config: DCAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
        config, channels = self.config, self.config.encoder_channels
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        stem = dict(axes=(None, "embed"), name="conv_in", **types)
        first = 0 if config.encoder_layers[0] else 1  # a stage without layers is skipped
        if first == 0:
            x = Conv3x3(channels[0], **stem)(images)
        else:
            x = downsample(images, channels[1], config.downsample, shortcut=False, **stem)
        x = split_batch(x)
        for i in range(first, len(channels)):
            x = Stage(config, "encoder", i, name=f"stage_{i}", remat=self.remat, **types)(x)
        latents = Conv3x3(config.latent_channels, ("embed", None), name="conv_out", **types)(x)
        if config.encoder_out_shortcut:
            latents = latents + average(x, config.latent_channels)
        return latents.astype(jnp.float32)


class Decoder(nn.Module):
    """Decodes unscaled latents to images around [-1, 1], in float32."""

    config: DCAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        config, channels = self.config, self.config.decoder_channels
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        latents = latents.astype(self.dtype)
        x = Conv3x3(channels[-1], (None, "embed"), name="conv_in", **types)(latents)
        if config.decoder_in_shortcut:
            x = x + duplicate(latents, channels[-1])
        x = split_batch(x)
        first = 0 if config.decoder_layers[0] else 1  # as in the encoder
        for i in reversed(range(first, len(channels))):
            x = Stage(config, "decoder", i, name=f"stage_{i}", remat=self.remat, **types)(x)
        head = dict(axes=("embed", None), name="conv_out", **types)
        if first == 0 and self._head_is_kernel(x):
            kernel, bias = Conv3x3(config.in_channels, **head).weights(x.shape[-1])
            norm = nn.unbox(self.variables["params"]["norm_out"])
            return image_head.image_head(x, norm["scale"], norm["bias"], kernel, bias)
        x = make_norm("rms_norm", name="norm_out", **types)(x)
        x = ACTIVATIONS[config.decoder_out_activation](x)
        if first == 0:
            images = Conv3x3(config.in_channels, **head)(x)
        else:
            images = upsample(x, config.in_channels, config.upsample, shortcut=False, **head)
        return images.astype(jnp.float32)

    def _head_is_kernel(self, x: Float[Array, "B H W C"]) -> bool:
        config = self.config
        known = config.decoder_out_activation == "relu" and not self.is_initializing()
        return known and image_head.uses_kernel(x.shape, config.in_channels, self.dtype, "auto")


class DCAE(nn.Module):
    """The autoencoder; `encode` and `decode` are methods for `apply`."""

    config: DCAEConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: bool = False

    def setup(self):
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype, remat=self.remat)
        self.encoder = Encoder(self.config, **types)
        self.decoder = Decoder(self.config, **types)

    def encode(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
        """Returns the unscaled latents of images in [-1, 1], in float32.

        Raises ValueError if H or W is not a multiple of `config.factor`.
        """
        _, height, width, _ = images.shape
        factor = self.config.factor
        if height % factor or width % factor:
            raise ValueError(f"images of {height} x {width} pixels: not multiples of {factor}")
        return self.encoder(images)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Returns the images of unscaled latents, around [-1, 1], not clamped, in float32."""
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Returns the reconstruction, decode(encode(images))."""
        return self.decode(self.encode(images))
