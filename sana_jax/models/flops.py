"""Counts the floating-point operations of the networks; a multiply-add is two of them.

Matrix products and convolutions count as the architecture defines them, also where an
implementation avoids some of the work, so that avoided work shows as speed. Norms, activations and
softmax do not count.
"""

import itertools

import jax

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.models.variants import mlp_width

# Prefix of a device's name -> its FLOP/s in dense bfloat16, as the vendors state them. The first
# match counts: "TPU v5" is a v5p.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak(device: jax.Device) -> float | None:
    """Returns a device's FLOP/s in bfloat16, or None for an unknown kind."""
    return next((f for name, f in PEAKS.items() if device.device_kind.startswith(name)), None)


def trunk(config: SanaConfig, height: int, width: int, rows: int) -> int:
    """Counts one pass of the transformer: latents of height x width, `rows` rows of text."""
    return captions(config, rows) + denoise(config, height, width, rows)


def captions(config: SanaConfig, rows: int) -> int:
    """Counts the part of `trunk` that no timestep changes: keys and values of the text."""
    c = config.width
    embedding = _linear(rows, config.caption_channels, c) + _linear(rows, c, c)
    return embedding + config.depth * _linear(rows, c, 2 * c)


def denoise(config: SanaConfig, height: int, width: int, rows: int) -> int:
    """Counts the part of `trunk` that runs at every step."""
    tokens = (height // config.patch_size) * (width // config.patch_size)
    c, patch = config.width, config.patch_size**2 * config.latent_channels
    # The timestep and Sprint's guidance: 256 features, an embedding; the modulation's six vectors.
    time = (1 + config.is_sprint) * (_linear(1, 256, c) + _linear(1, c, c)) + _linear(1, c, 6 * c)
    return config.depth * _block(config, tokens, rows) + time + _linear(tokens, patch, 2 * c)


def blocks(config: SanaConfig, tokens: int, rows: int) -> int:
    """Counts the blocks of `trunk` alone, including their keys and values of the text."""
    keys_values = _linear(rows, config.width, 2 * config.width)
    return config.depth * (_block(config, tokens, rows) + keys_values)


def _block(config: SanaConfig, tokens: int, rows: int) -> int:
    """Counts one block without the keys and values of the text."""
    c, hidden = config.width, int(config.mlp_ratio * config.width)
    if config.attention == "softmax":
        mixing = 4 * tokens**2 * c
    else:
        mixing = _linear_attention(tokens, c, config.head_dim)
    cross = _linear(tokens, c, 2 * c) + 4 * tokens * rows * c
    if config.ffn == "mlp":
        ffn = 2 * _linear(tokens, c, mlp_width(hidden))
    else:
        ffn = _glumbconv(tokens, c, hidden)
    return _linear(tokens, c, 4 * c) + mixing + cross + ffn


def text(config: Gemma2Config, tokens: int, before: int = 0) -> int:
    """Counts `tokens` in the text encoder, after `before` tokens with known keys and values.

    Attention counts in full, as if no token were hidden.
    """
    c, heads = config.hidden_size, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    layer = _linear(tokens, c, 2 * heads + 2 * keys) + 4 * tokens * (before + tokens) * heads
    return config.num_layers * (layer + _linear(tokens, c, 3 * config.intermediate_size))


def encode(config: DCAEConfig, height: int, width: int) -> int:
    """Counts the encoder for one image of height x width pixels."""
    total, first = 0, 0 if config.encoder_layers[0] else 1
    pixels = [height * width // 4**i for i in range(len(config.encoder_channels))]
    channels = config.encoder_channels
    if first == 0:
        total += _conv(pixels[0], config.in_channels, channels[0])
    else:
        total += _resize(pixels[0], config.in_channels, channels[1], config.downsample)
    for i, c in enumerate(channels):
        total += _blocks(config, "encoder", i, pixels[i])
        if i >= first and i + 1 < len(channels):
            total += _resize(pixels[i], c, channels[i + 1], config.downsample)
    return total + _conv(pixels[-1], channels[-1], config.latent_channels)


def decode(config: DCAEConfig, height: int, width: int) -> int:
    """Counts the decoder for one image of height x width pixels."""
    first = 0 if config.decoder_layers[0] else 1
    pixels = [height * width // 4**i for i in range(len(config.decoder_channels))]
    channels = config.decoder_channels
    total = _conv(pixels[-1], config.latent_channels, channels[-1])
    total += sum(_blocks(config, "decoder", i, pixels[i]) for i in range(len(channels)))
    for i, (c, deeper) in enumerate(itertools.pairwise(channels)):
        if i >= first:
            total += _resize(pixels[i], deeper, c, config.upsample)
    if first == 0:
        return total + _conv(pixels[0], channels[0], config.in_channels)
    return total + _resize(pixels[0], channels[1], config.in_channels, config.upsample)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _conv(pixels: int, inputs: int, outputs: int) -> int:
    """Counts a 3x3 convolution with `pixels` pixels of output."""
    return 9 * _linear(pixels, inputs, outputs)


def _linear_attention(tokens: int, channels: int, head_dim: int) -> int:
    """Counts both products; v has a column of ones, whose sums normalise."""
    return 4 * tokens * channels * (head_dim + 1)


def _glumbconv(pixels: int, channels: int, hidden: int) -> int:
    """Counts the product up to 2 `hidden` channels, depthwise 3x3, and the product back."""
    return _linear(pixels, channels, 3 * hidden) + 2 * 9 * pixels * 2 * hidden


def _resize(pixels: int, inputs: int, outputs: int, kind: str) -> int:
    """Counts a change of resolution; `pixels` are those of the finer side."""
    if kind == "pixel_unshuffle":
        return _conv(pixels, inputs, outputs // 4)
    if kind == "pixel_shuffle":
        return _conv(pixels // 4, inputs, 4 * outputs)
    return _conv(pixels // 4 if kind == "conv" else pixels, inputs, outputs)


def _blocks(config: DCAEConfig, side: str, stage: int, pixels: int) -> int:
    def of_stage(name):
        return getattr(config, f"{side}_{name}")[stage]

    c, layers = of_stage("channels"), of_stage("layers")
    if of_stage("blocks") == "ResBlock":
        return layers * 2 * _conv(pixels, c, c)
    head_dim, scales = config.attention_head_dim, of_stage("qkv_multiscales")
    # Each scale adds as many heads again: depthwise, then within each head's q, k and v.
    wider = sum(_linear(pixels, size * size + head_dim, 3 * c) for size in scales)
    heads = c * (1 + len(scales))
    attention = _linear(pixels, c, 3 * c) + wider + _linear_attention(pixels, heads, head_dim)
    return layers * (attention + _linear(pixels, heads, c) + _glumbconv(pixels, c, 4 * c))
