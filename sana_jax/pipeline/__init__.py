"""From prompts to pixels: the request, the jitted programs, and the pipeline that runs them."""

from sana_jax.pipeline.pipeline import SanaPipeline

__all__ = ["SanaPipeline"]
