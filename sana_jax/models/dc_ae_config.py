"""The architecture of DC-AE as a config, and the published ones as presets."""

import dataclasses
import itertools

from sana_jax.models.config import Layers, check_fields, later

# Far above what is published: 8 stages, 23 layers of a side, one scale of size 5. Layers are built
# one after the other.
MAX_STAGES, MAX_LAYERS, MAX_SCALES, MAX_KERNEL = 12, 64, 8, 63
_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_SCALES = ((),) * 3 + ((5,),) * 3


@dataclasses.dataclass(frozen=True)
class DCAEConfig:
    """The architecture of a release; the defaults are SANA's autoencoder.

    Tuples have one entry for each stage, full resolution first. A first stage without layers is
    left out: the outermost convolution then changes the resolution itself. Raises ValueError,
    naming the field, for an architecture that dc_ae.py cannot build.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_blocks: tuple[str, ...] = _BLOCKS
    decoder_blocks: tuple[str, ...] = _BLOCKS
    encoder_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    # Depthwise kernel sizes; each adds as many heads, which see q, k and v of a neighbourhood.
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _SCALES
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _SCALES
    decoder_norms: tuple[str, ...] = ("rms_norm",) * 6  # all of the encoder's
    decoder_activations: tuple[str, ...] = ("silu",) * 6  # of ResBlocks; all of the encoder's
    downsample: str = "conv"  # with stride 2; "pixel_unshuffle": conv, then space to channel
    upsample: str = "interpolate"  # to the nearest, then conv; "pixel_shuffle": channel to space
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_out_activation: str = "relu"
    scaling_factor: float = 0.41407  # 1 / root mean square of the latents
    quantised: Layers = later((), repr=False)  # see quantisation/table.py

    def __post_init__(self):
        def reject(field, problem):
            raise ValueError(f"autoencoder {field} {getattr(self, field)!r}: {problem}")

        check_fields(self, "autoencoder")
        stages = len(self.encoder_channels)
        if not 2 <= stages <= MAX_STAGES or 0 in self.encoder_channels + self.decoder_channels:
            reject("encoder_channels", f"needs 2 to {MAX_STAGES} stages, and none of width 0")
        for field in PER_STAGE:
            if len(getattr(self, field)) != stages:
                reject(field, f"needs one entry for each of {stages} stages")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if {*([value] if isinstance(value, str) else value)} - {*choices}:
                reject(field, f"only {' and '.join(choices)} are supported")
        for side in ("encoder", "decoder"):
            channels, layers = getattr(self, f"{side}_channels"), getattr(self, f"{side}_layers")
            attention = zip(getattr(self, f"{side}_blocks"), channels, strict=True)
            if any(b == "EfficientViTBlock" and c % self.attention_head_dim for b, c in attention):
                reject("attention_head_dim", f"does not divide {side}_channels {channels}")
            if sum(layers) > MAX_LAYERS:
                reject(f"{side}_layers", f"more than {MAX_LAYERS} layers in all are not supported")
            scales = getattr(self, f"{side}_qkv_multiscales")
            sizes = [size for stage in scales for size in stage]
            if max(map(len, scales)) > MAX_SCALES or not all(
                size in range(1, MAX_KERNEL + 1, 2) for size in sizes
            ):
                reject(
                    f"{side}_qkv_multiscales",
                    f"only up to {MAX_SCALES} odd sizes up to {MAX_KERNEL} are supported",
                )
            if not all(layers[1:-1]):
                reject(f"{side}_layers", "only the first or last stage may have no layers")
            whole = [4 * c % deeper == 0 for c, deeper in itertools.pairwise(channels)]
            if not all(whole) or channels[-1] % self.latent_channels:
                reject(f"{side}_channels", "the shortcuts need whole groups of channels")

    @property
    def factor(self) -> int:
        """The number of pixels along a side of one latent."""
        return 2 ** (len(self.encoder_channels) - 1)


PER_STAGE = [
    f.name for f in dataclasses.fields(DCAEConfig) if f.default and isinstance(f.default, tuple)
]
_CHOICES = {
    "encoder_blocks": ("ResBlock", "EfficientViTBlock"),
    "decoder_blocks": ("ResBlock", "EfficientViTBlock"),
    "decoder_norms": ("rms_norm", "batch_norm"),
    "decoder_activations": ("relu", "silu"),
    "downsample": ("conv", "pixel_unshuffle"),
    "upsample": ("interpolate", "pixel_shuffle"),
    "decoder_out_activation": ("relu", "silu"),
}


def _paper(latent_channels: int, scaling_factor: float, *deeper: int) -> DCAEConfig:
    """Returns a release of the DC-AE paper; `deeper` are the widths of stages past the sixth."""
    extra = len(deeper)
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * (3 + extra)
    channels = (128, 256, 512, 512, 1024, 1024, *deeper)
    return DCAEConfig(
        latent_channels=latent_channels,
        encoder_blocks=blocks,
        decoder_blocks=blocks,
        encoder_channels=channels,
        decoder_channels=channels,
        encoder_layers=(0, 4, 8, 2, 2, 2) + (2,) * extra,
        decoder_layers=(0, 5, 10, 2, 2, 2) + (2,) * extra,
        encoder_qkv_multiscales=((),) * (6 + extra),
        decoder_qkv_multiscales=((),) * (6 + extra),
        decoder_norms=("batch_norm",) * 3 + ("rms_norm",) * (3 + extra),
        decoder_activations=("relu",) * 3 + ("silu",) * (3 + extra),
        downsample="pixel_unshuffle",
        upsample="pixel_shuffle",
        scaling_factor=scaling_factor,
    )


PRESETS = {
    "dc-ae-f32c32-sana-1.0": DCAEConfig(),
    "dc-ae-f32c32-sana-1.1": DCAEConfig(),  # the decoder has other weights
    "dc-ae-lite-f32c32-sana-1.1": DCAEConfig(
        decoder_blocks=("ResBlock",) * 6,
        decoder_layers=(0, 3, 5, 4, 4, 4),
        decoder_qkv_multiscales=((),) * 6,
        upsample="pixel_shuffle",
        decoder_out_activation="silu",
    ),
    "dc-ae-f32c32-in-1.0": _paper(32, 0.3189),
    "dc-ae-f32c32-mix-1.0": _paper(32, 0.4552),
    "dc-ae-f64c128-in-1.0": _paper(128, 0.2889, 2048),
    "dc-ae-f64c128-mix-1.0": _paper(128, 0.4538, 2048),
    "dc-ae-f128c512-in-1.0": _paper(512, 0.4883, 2048, 2048),
    "dc-ae-f128c512-mix-1.0": _paper(512, 0.3620, 2048, 2048),
}
