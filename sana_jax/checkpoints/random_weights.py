"""Random weights for networks of true size: reproducible, and made only when they are used."""

import math
from functools import partial

import numpy as np

from sana_jax.runtime.errors import UserError

TINY, TINY_SPRINT = "tiny", "tiny_sprint"
KNOWN = (
    "tiny, tiny_sprint, or sana_600m_512, _1024; sana_1600m_512, _1024, _2048, _4096;"
    " sana1.5_1600m_1024; sana1.5_4800m_1024; sana_sprint_600m_1024; sana_sprint_1600m_1024"
)


def random_weight(
    path: str, shape: tuple[int, ...], seed: int, dtype: np.dtype, distinct: int | None = None
) -> np.ndarray:
    """Returns normal random values whose spread keeps activations in range.

    No parameter is left at a neutral value, such as 0 or 1. `distinct` limits the number of drawn
    values, which are then repeated: ten times as fast for a large array.
    """
    size = math.prod(shape)
    key = [seed, *path.encode()]
    normal = np.random.default_rng(key).standard_normal(min(size, distinct or size), np.float32)
    normal *= _spread(path, shape)
    normal += _centre(path)
    values = normal.astype(dtype, copy=False)
    return values.reshape(shape) if values.size == size else np.resize(values, shape)


def _centre(path: str) -> np.float32:
    # Gemma's scales are offsets from one.
    plain = path.endswith("/scale") and not path.startswith("text_encoder")
    return np.float32(1 if plain or path.endswith("/var") else 0)


def _spread(path: str, shape: tuple[int, ...]) -> np.float32:
    name = path.rsplit("/", 1)[-1]
    if name.endswith("kernel"):
        stacked = "/blocks/" in path or "/layers/" in path
        sums = shape[stacked:-1]  # the axes that one output is a sum over
        fan_in = sums[-1] if name == "pointwise_kernel" else np.prod(sums)
        gain = 0.5 if path.endswith("decoder/conv_out/kernel") else 1  # so that few pixels clip
        return np.float32(gain * fan_in**-0.5)
    if name == "embedding":
        return np.float32(shape[-1] ** -0.5)
    return np.float32(0.3 if name.endswith("table") else 0.1)


def configs(preset: str):
    """Returns a preset's three configs, in the order of components.CONFIGS. Raises UserError."""
    from sana_jax.models.dc_ae_config import DCAEConfig
    from sana_jax.models.dit import PRESETS, SPRINT, SanaConfig
    from sana_jax.models.gemma2 import Gemma2Config

    if preset not in (TINY, TINY_SPRINT):
        if preset not in PRESETS:
            known = ", ".join([TINY, TINY_SPRINT, *PRESETS])
            raise UserError(f"preset {preset!r} is not one of {known}")
        return PRESETS[preset], DCAEConfig(), Gemma2Config()
    widths = (8, 16, 16, 32, 32, 64)
    kind = SPRINT if preset == TINY_SPRINT else {}
    return (
        SanaConfig(depth=2, width=64, cross_heads=2, caption_channels=48, sample_size=8, **kind),
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


def make(preset: str, dtype: str = "float32", seed: int = 0, distinct: int | None = None):
    """Returns a Checkpoint whose weights are made only when they are used; see random_weight."""
    from flax import traverse_util

    from sana_jax.checkpoints.components import CONFIGS, Checkpoint, param_shapes
    from sana_jax.checkpoints.tensors import LazyArray, numpy_dtype
    from sana_jax.text.tokenizers import toy_tokenizer

    networks, params = dict(zip(CONFIGS, configs(preset), strict=True)), {}
    for name, config in networks.items():
        arrays = {}
        for path, leaf in param_shapes(config).items():
            make_weight = partial(
                random_weight, f"{name}/{path}", leaf.shape, seed, distinct=distinct
            )
            arrays[path] = LazyArray(leaf.shape, numpy_dtype(dtype), make_weight)
        params[name] = traverse_util.unflatten_dict(arrays, sep="/")
    provenance = {"source": f"random weights, preset {preset}, seed {seed}"}
    return Checkpoint(**networks, params=params, tokenizer=toy_tokenizer(), provenance=provenance)
