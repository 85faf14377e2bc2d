"""Trains text to image from a config.

    python -m sana_jax.train --config=configs/sana_600m_512.py --workdir=DIR \\
        --config.autoencoder=CHECKPOINT --config.text_encoder.checkpoint=CHECKPOINT \\
        --config.data.source=precomputed:DATA

The same command continues a run that was stopped, killed or preempted. DIR holds what the run shows
and saves; DIR/model is the result, a native folder, and `convert --source=DIR` makes one of the
newest checkpoint at any time. On several hosts run it on every one, with --multihost; all of them
must mount DIR.
"""

import jax
from absl import flags
from ml_collections.config_flags import config_flags

from sana_jax import cli, compilation_cache
from sana_jax.training.text_to_image_run import TextToImageTraining

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
    TextToImageTraining(CONFIG.value, WORKDIR.value).run()


if __name__ == "__main__":
    cli.run(main, resumes=True)
