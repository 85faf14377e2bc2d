"""Writes a checkpoint with random weights, to try, measure or test the software.

    python -m sana_jax.random_checkpoint --out=DIR                      # tiny: samples in a second
    python -m sana_jax.random_checkpoint --out=DIR --preset=sana_600m_512 --format=diffusers

Every preset but the tiny ones has the full-size autoencoder and Gemma-2 2B (5 GB of weights in
bfloat16). Weights are made and written one shard after another. Pictures drawn with them show
nothing.
"""

import jax
from absl import flags

from sana_jax.checkpoints.random_weights import KNOWN, TINY, make
from sana_jax.runtime import cli
from sana_jax.runtime.files import check_new, new_folder

FLAGS = flags.FLAGS
_OUT = flags.DEFINE_string("out", None, "folder to write, new or empty", required=True)
_PRESET = flags.DEFINE_string("preset", TINY, f"the networks' sizes: {KNOWN}")
_FORMAT = flags.DEFINE_enum("format", "native", ["native", "diffusers"], "layout of the folder")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of the weights")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the weights", 0, 2**32 - 1)
_SHARD = flags.DEFINE_integer(
    "max_shard_mb", 2000, "largest size of a weight file, MB", lower_bound=1
)


def main(argv):
    del argv
    out = check_new(_OUT.value)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use, or be too small
    checkpoint = make(_PRESET.value, _DTYPE.value, _SEED.value)

    from sana_jax.checkpoints import diffusers, native

    save = {"native": native.save, "diffusers": diffusers.save}[_FORMAT.value]
    with new_folder(out):
        save(checkpoint, out, max_shard_bytes=_SHARD.value * 10**6)
    print(f"{out}: {_PRESET.value} with random weights, {_FORMAT.value} layout")


if __name__ == "__main__":
    cli.run(main)
