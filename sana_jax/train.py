"""Trains a text-to-image model from a config.

    python -m sana_jax.train --config=configs/sana_600m_512.py --workdir=DIR \\
        --config.autoencoder=CHECKPOINT --config.text_encoder.checkpoint=CHECKPOINT \\
        --config.data.source=precomputed:DATA
    python -m sana_jax.train --config=configs/finetune.py --workdir=DIR \\
        --config.start=CHECKPOINT --config.data.source=PICTURES \\
        --config.data.caption="a photo of sks dog"

The same command continues a run that was stopped, killed or preempted. DIR holds the run's metrics,
pictures and checkpoints. DIR/model is the result, the moving average: a native folder, or the file
of a LoRA. `convert --source=DIR --ema` makes a native folder from the newest checkpoint at any
time, a LoRA merged. On several hosts, run the command on each of them, with --multihost; DIR is a
folder that all of them mount.
"""

from ml_collections import ConfigDict

from sana_jax.runtime import cli
from sana_jax.training.command import training_command
from sana_jax.training.distillation.run import DistillationTraining
from sana_jax.training.text_to_image.run import TextToImageTraining


def make_training(config: ConfigDict, workdir: str) -> TextToImageTraining:
    """Returns the training of a config, which is a distillation where it has such a group."""
    kind = DistillationTraining if "distillation" in config else TextToImageTraining
    return kind(config, workdir)


main = training_command(make_training)

if __name__ == "__main__":
    cli.run(main, resumes=True)
