"""SANA in JAX: text to image with a deep-compression autoencoder and a linear transformer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sana_jax.pipeline.pipeline import SanaPipeline

__all__ = ["SanaPipeline"]


def __getattr__(name: str):
    # Imported on first use: `--help` of a command does not wait for jax.
    if name == "SanaPipeline":
        from sana_jax.pipeline.pipeline import SanaPipeline

        return SanaPipeline
    raise AttributeError(f"module 'sana_jax' has no attribute {name!r}")
