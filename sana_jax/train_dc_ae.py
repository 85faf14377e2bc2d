"""Trains a deep-compression autoencoder, phase by phase, from a config.

    python -m sana_jax.train_dc_ae --config=configs/dc_ae_shapes.py --workdir=DIR
    python -m sana_jax.train_dc_ae --config=configs/dc_ae_f32c32.py --workdir=DIR \\
        --config.data.source=PHOTOS --config.perceptual.weights=vgg_lpips.safetensors

The same command continues a run that was stopped, killed or preempted. DIR/PHASE holds a phase's
metrics, pictures and checkpoints; DIR/model is the result, which `evaluate --task=reconstruction`
measures. With --config.start=CHECKPOINT (a folder, a name on the hub, or `shapes`) the first phase
starts from the weights of another autoencoder of the same architecture. On several hosts, run the
command on each of them, with --multihost; DIR is a folder that all of them mount.
"""

from sana_jax.runtime import cli
from sana_jax.training.autoencoder.run import AutoencoderTraining
from sana_jax.training.command import training_command

main = training_command(AutoencoderTraining)

if __name__ == "__main__":
    cli.run(main, resumes=True)
