"""Writes a checkpoint with random weights: to try the software, to measure it, to test it.

    python -m sana_jax.random_checkpoint --out=DIR                      # tiny, a second to sample
    python -m sana_jax.random_checkpoint --out=DIR --preset=sana_600m_512 --format=diffusers

Every preset but tiny has the full-size autoencoder and Gemma-2 2B (5 GB of weights in bfloat16).
Weights are made and written one shard after the other. Pictures from them show nothing.
"""

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags

from sana_jax import cli
from sana_jax.errors import UserError

TINY = "tiny"

FLAGS = flags.FLAGS
_OUT = flags.DEFINE_string("out", None, "folder to write, new or empty", required=True)
_PRESET = flags.DEFINE_string("preset", TINY, "tiny, or a published model such as sana_600m_1024")
_FORMAT = flags.DEFINE_enum("format", "native", ["native", "diffusers"], "layout of the folder")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the weights")
_SEED = flags.DEFINE_integer("seed", 0, "of the weights", lower_bound=0)
_SHARD = flags.DEFINE_integer("max_shard_mb", 2000, "size of a weight file, MB", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class RandomArray:
    """A weight that comes into being when it is written, so that no whole network is in memory."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    seed: int

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        key = [self.seed, *self.path.encode()]
        normal = np.random.default_rng(key).standard_normal(self.shape, np.float32)
        return self._scaled(normal).astype(dtype or self.dtype)

    def _scaled(self, normal: np.ndarray) -> np.ndarray:
        """Spreads that keep activations in range; nothing is left at a neutral value."""
        name = self.path.rsplit("/", 1)[-1]
        stacked = "/blocks/" in self.path or "/layers/" in self.path
        if name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            sums = self.shape[stacked:-1]  # what one output is a sum over
            fan_in = sums[-1] if name == "pointwise_kernel" else np.prod(sums)
            gain = 0.5 if self.path.endswith("decoder/conv_out/kernel") else 1.0  # few pixels clip
            return normal * np.float32(gain * fan_in**-0.5)
        if name == "embedding":
            return normal * np.float32(self.shape[-1] ** -0.5)
        if name == "scale" and self.path.startswith("text_encoder"):
            return 0.1 * normal  # an offset from one
        if name == "scale":
            return 1 + 0.1 * normal
        if name == "var":
            return 0.5 + np.abs(normal)
        return (0.3 if name.endswith("table") else 0.1) * normal


def configs(preset: str):
    """The three networks of a preset."""
    from sana_jax.models.dc_ae import DCAEConfig
    from sana_jax.models.dit import PRESETS, SanaConfig
    from sana_jax.models.gemma2 import Gemma2Config

    if preset != TINY:
        if preset not in PRESETS:
            raise UserError(f"preset {preset!r} is not one of {TINY}, {', '.join(PRESETS)}")
        return PRESETS[preset], DCAEConfig(), Gemma2Config()
    widths = (8, 16, 16, 32, 32, 64)
    return (
        SanaConfig(depth=2, width=64, cross_heads=2, caption_channels=48, sample_size=8),
        DCAEConfig(
            encoder_channels=widths,
            decoder_channels=widths,
            encoder_layers=(1,) * 6,
            decoder_layers=(1,) * 6,
        ),
        Gemma2Config(
            vocab_size=640,
            hidden_size=48,
            intermediate_size=96,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=24,
            query_pre_attn_scalar=24,
        ),
    )


def make(preset: str, dtype: str = "float32", seed: int = 0):
    """A Checkpoint whose weights are RandomArrays: it can be saved, not run."""
    from flax import traverse_util

    from sana_jax.checkpoints.components import Checkpoint, layout, module_for
    from sana_jax.checkpoints.tensors import numpy_dtype
    from sana_jax.sharding import make_mesh
    from sana_jax.toy_tokenizer import toy_tokenizer

    names = dict(zip(("dit", "vae", "text_encoder"), configs(preset), strict=True))
    mesh, params = make_mesh(), {}
    for name, config in names.items():
        shapes, _ = layout(module_for(config, dtype), mesh)
        arrays = {
            path: RandomArray(f"{name}/{path}", leaf.shape, numpy_dtype(dtype), seed)
            for path, leaf in shapes.items()
        }
        params[name] = traverse_util.unflatten_dict(arrays, sep="/")
    provenance = {"source": f"random weights, preset {preset}, seed {seed}"}
    return Checkpoint(**names, params=params, tokenizer=toy_tokenizer(), provenance=provenance)


def main(argv):
    del argv
    out = Path(_OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder")
    from sana_jax.checkpoints import diffusers, native

    checkpoint = make(_PRESET.value, _DTYPE.value, _SEED.value)
    save = {"native": native.save, "diffusers": diffusers.save}[_FORMAT.value]
    save(checkpoint, out, max_shard_bytes=_SHARD.value * 10**6)
    print(f"{out}: {_PRESET.value} with random weights, {_FORMAT.value} layout")


if __name__ == "__main__":
    cli.run(main)
