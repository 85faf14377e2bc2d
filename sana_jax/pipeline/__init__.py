"""From prompts to pixels: a request, the programs that it runs, and the pipeline that runs them."""

from sana_jax.pipeline.pipeline import SanaPipeline

__all__ = ["SanaPipeline"]
