"""What the files in configs/ start from: recipes with their defaults, as ml_collections configs."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.training.autoencoder import Phase
from sana_jax.training.optimizers import OptimizerConfig


def autoencoder(network: DCAEConfig) -> ConfigDict:
    """DC-AE in three phases (arXiv 2410.10733, section 3.3 and appendix A).

    The learning rates, decays and betas are the paper's; so is what trains, as far as it says: its
    "head layers" are taken to be the single convolutions around the latent and before the pixels.
    Steps, batches, loss weights and the moving average are unpublished, and ours.
    """

    def phase(name, learning_rate, weight_decay, betas, **fields):
        optimizer = OptimizerConfig(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta1=betas[0],
            beta2=betas[1],
            clip_norm=1.0,
        )
        return {name: Phase(autoencoder=optimizer, discriminator=optimizer, **fields)}

    phases = phase(
        "low_resolution",
        *(6.4e-5, 0.1, (0.9, 0.999)),
        steps=200_000,
        image_size=256,
        batch_size=256,
        trainable=(".*",),
    )
    phases |= phase(
        "latent_adaptation",
        *(1.6e-5, 0.001, (0.9, 0.999)),
        steps=20_000,
        image_size=1024,
        batch_size=32,
        trainable=("encoder/conv_out/.*", "decoder/conv_in/.*"),
    )
    phases |= phase(
        "local_refinement",
        *(5.4e-5, 0.0, (0.5, 0.9)),
        steps=100_000,
        image_size=256,
        batch_size=256,
        trainable=("decoder/conv_out/.*",),
        adversarial=0.5,
    )
    return ConfigDict(
        {
            "seed": 0,
            "network": dataclasses.asdict(network),
            # The autoencoder that the first phase starts from: "shapes" or a checkpoint's folder.
            "start": config_dict.placeholder(str),
            "discriminator": {"width": 64, "layers": 3, "norm": "group_norm"},
            # A loss of training/perceptual.py, and the file of its weights where it has any.
            "perceptual": {"name": "lpips_vgg", "weights": config_dict.placeholder(str)},
            "dtype": "bfloat16",  # of activations; parameters are float32
            "remat": False,  # compute the blocks' activations again in the backward pass
            "mesh": {"replica": 1, "fsdp": -1},
            "data": {
                "source": "shapes",  # or tfds:NAME, or a folder of images
                "data_dir": config_dict.placeholder(str),  # default: WORKDIR/data
                "train_split": "train",
                "test_split": "test",
                # Of the built-in data set: (pixels, training records) for each size in use.
                "shapes": {"train": ((128, 20_000), (256, 4_000)), "test": 1000, "seed": 0},
            },
            "loader": {"threads": 8, "prefetch": 4},
            # Those to run, in order; each starts from the last one's moving average.
            "run": tuple(phases),
            "phases": {name: dataclasses.asdict(phase) for name, phase in phases.items()},
            "evaluation": {"images": 1000, "batch_size": 32, "sizes": (256, 512)},
            "scale_images": 2048,  # the latents' scaling factor is measured on so many
            "loop": {
                "log_every": 50,
                "checkpoint_every": 1000,
                "images_every": 1000,
                "max_streak": 20,
                "watchdog_seconds": 0.0,
                "profile": False,
            },
            "keep": 3,  # checkpoints
        }
    )
