"""Embeddings of the timestep, the positions and the caption, for the blocks of models/dit.py.

Letters as there: B batch, L text rows of width T, C width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.models.layers import Dtype, RMSNorm, dense
from sana_jax.sharding import constrain

small_normal = nn.initializers.normal(0.02)


def timestep_features(timestep: Float[Array, " B"], size: int = 256) -> Float[Array, "B size"]:
    """Returns [cos | sin] of the timestep at frequencies 10000^(-i / (size/2)), in float32."""
    half = size // 2
    # Computed in float64, then rounded: at timestep 999 an error of 5e-7 is 5e-4 of a radian.
    frequencies = (10000.0 ** -(np.arange(half) / half)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_features(length: int, base: int, scale: float, size: int) -> np.ndarray:
    """Returns [sin | cos] along one side of the image, (length, size) in float32.

    Coordinates run over [0, base / scale) for any length, so that a larger picture has the
    positions that the network was trained on, only denser.
    """
    coordinates = np.arange(length, dtype=np.float32) / np.float32(length / base) / scale
    omega = 10000.0 ** -(np.arange(size // 2, dtype=np.float64) / (size / 2))
    angles = coordinates.astype(np.float64)[:, None] * omega[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


class TimestepEmbedder(nn.Module):
    """Maps timesteps to embeddings (B, C) and the modulation (B, 6, C) that all blocks share.

    A guidance scale, where one is given, has an embedding of its own, which is added to that of the
    timestep (Sprint, arXiv 2503.09641). Always computes in float32: it costs little, and bfloat16
    would coarsen the noise level.
    """

    width: int
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, timestep: Float[Array, " #B"], guidance: Float[Array, " #B"] | None = None):
        def linear(features, name, axes):
            return dense(
                features,
                axes,
                kernel_init=small_normal,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                precision=jax.lax.Precision.HIGHEST,
                name=name,
            )

        def embed(scalar, prefix):
            x = linear(self.width, f"{prefix}linear_1", (None, "embed"))(timestep_features(scalar))
            x = constrain(x, "batch", "residual")
            x = linear(self.width, f"{prefix}linear_2", ("embed", "heads"))(jax.nn.silu(x))
            return constrain(x, "batch", "residual")

        embedding = embed(timestep, "")
        if guidance is not None:
            embedding = embedding + embed(guidance, "guidance_")
        modulation = linear(6 * self.width, "modulation", ("embed", "heads"))
        return embedding, rearrange(modulation(jax.nn.silu(embedding)), "b (s c) -> b s c", s=6)


class CaptionEmbedder(nn.Module):
    """Maps text rows to the width C; the norm tames Gemma's large hidden states."""

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, caption: Float[Array, "B L T"]) -> Float[Array, "B L C"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        linear = dict(kernel_init=small_normal, **types)
        caption = constrain(caption, "batch", None, None)
        x = dense(self.width, (None, "embed"), name="linear_1", **linear)(caption)
        x = constrain(x, "batch", None, "residual")
        x = jax.nn.gelu(x.astype(jnp.float32), approximate=True)
        x = dense(self.width, ("embed", "heads"), name="linear_2", **linear)(x)
        x = constrain(x, "batch", None, "residual")
        return RMSNorm(1e-5, scale_init=0.01, name="norm", **types)(x)
