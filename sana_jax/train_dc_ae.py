"""Trains a deep-compression autoencoder, phase by phase, from a config.

    python -m sana_jax.train_dc_ae --config=configs/dc_ae_shapes.py --workdir=DIR
    python -m sana_jax.train_dc_ae --config=configs/dc_ae_f32c32.py --workdir=DIR \\
        --config.data.source=PHOTOS --config.perceptual.weights=vgg_lpips.safetensors

The same command continues a run that was stopped, killed or preempted. DIR/PHASE holds what a
phase shows and saves; DIR/model is the result, which `evaluate --task=reconstruction` measures.
With --config.start=CHECKPOINT the first phase starts from the weights of an autoencoder of the same
network: a folder, a name on the hub, or `shapes`.
On several hosts run it on every one, with --multihost; all of them must mount DIR.
"""

import jax
from absl import flags
from ml_collections.config_flags import config_flags

from sana_jax import cli, compilation_cache
from sana_jax.training.dc_ae_phases import AutoencoderTraining

CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe, a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, made if missing; it may be big")
MULTIHOST = flags.DEFINE_bool("multihost", False, "find and join the other hosts of the job")
CACHE = flags.DEFINE_string(
    "compilation_cache", None, 'folder for compiled programs, "" for none; default: the user\'s'
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    del argv
    if MULTIHOST.value:
        jax.distributed.initialize()
    compilation_cache.enable(CACHE.value)
    AutoencoderTraining(CONFIG.value, WORKDIR.value).run()


if __name__ == "__main__":
    cli.run(main, resumes=True)
