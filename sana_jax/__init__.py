"""SANA in JAX: text to image with a deep-compression autoencoder and a linear transformer."""

import sys

# As long as Python looks for the module of `python -m sana_jax.train`, argv begins with "-m".
_command = sys.orig_argv[-len(sys.argv)].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""
if _command.startswith("sana_jax."):
    from sana_jax.runtime import signals

    signals.start(resumes=_command in signals.TRAININGS)

    from sana_jax.runtime import output

    output.guard()

from typing import TYPE_CHECKING  # noqa: E402

from sana_jax.runtime import tpu_flags  # noqa: E402

tpu_flags.set_defaults()

if TYPE_CHECKING:
    from sana_jax.pipeline.pipeline import SanaPipeline

__all__ = ["SanaPipeline"]


def __getattr__(name: str):
    # Imported on first use: `--help` of a command does not wait for jax.
    if name == "SanaPipeline":
        from sana_jax.pipeline.pipeline import SanaPipeline

        return SanaPipeline
    raise AttributeError(f"module 'sana_jax' has no attribute {name!r}")
