"""What the files in configs/ start from: recipes with their defaults, as ml_collections configs."""

import dataclasses
import operator
from collections.abc import Mapping

from ml_collections import ConfigDict, config_dict

from sana_jax.arguments import MAX_SEED
from sana_jax.data.captions import CaptionChoice
from sana_jax.errors import UserError
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.training.autoencoder import Phase
from sana_jax.training.optimizers import OptimizerConfig
from sana_jax.training.text_to_image import Recipe

# Of the full-size recipes' validation images.
PROMPTS = (
    "a red cube on top of a blue sphere",
    "a portrait of an old fisherman, soft morning light",
    "a small wooden house by a lake, mountains behind it, autumn",
    "a cat that wears a space suit, watercolour",
    "a bowl of ramen seen from above",
    "a shop window with the words open late",
    "an astronaut rides a white horse through a desert",
    "macro photograph of a dew drop on a leaf",
)

# The least that numbers of both kinds of recipe may be, which what uses them would refuse late.
LEAST = {
    "seed": 0,
    "data.shapes.seed": 0,
    "keep": 1,  # or the step that was just saved would go too
    "loader.threads": 0,
    "loader.prefetch": 0,
    "loader.bad_fraction": 0,
    "loop.log_every": 0,
    "loop.checkpoint_every": 0,
    "loop.images_every": 0,
    "loop.max_streak": 0,
    "loop.watchdog_seconds": 0,
}


def check_least(config: ConfigDict, more: Mapping[str, int]) -> None:
    """Raises UserError for numbers of a recipe below LEAST, or below those of `more`."""
    for key, least in (LEAST | more).items():
        value = operator.attrgetter(key)(config)
        if value is not None and not value >= least:
            raise UserError(f"config.{key}={value}: it is at least {least}")
    if config.seed > MAX_SEED:
        raise UserError(f"config.seed={config.seed}: it is at most {MAX_SEED}")


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
            # Decoded images are kept in memory, up to so many GiB of each host's. A run stands so
            # many bad records of those that it reads, or ten an epoch and host.
            "loader": {"threads": 8, "prefetch": 4, "cache_gib": 4.0, "bad_fraction": 0.001},
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
                "watchdog_seconds": 1800.0,
                "profile": False,
            },
            "keep": 3,  # checkpoints
        }
    )


def text_to_image(network: SanaConfig, steps: int, batch_size: int) -> ConfigDict:
    """SANA's training of the transformer (arXiv 2410.10629 and its published configs).

    CAME at 1e-4 for a batch of 256, scaled by the root of the batch; 2,000 steps of warm-up, then
    constant; gradients clipped at 0.1; a tenth of the captions dropped; logit-normal noise levels,
    shifted by 3 (the 0.6B at 1024 px: by 4). The moving average is ours: theirs is off by default.
    """
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig("came", learning_rate=1e-4, warmup_steps=2000, clip_norm=0.1),
    )
    return ConfigDict(
        {
            "seed": 0,
            "network": dataclasses.asdict(network),
            # A checkpoint whose transformer is trained on; none: it starts from nothing.
            "start": config_dict.placeholder(str),
            "autoencoder": config_dict.placeholder(str),  # the checkpoint that has it
            "text_encoder": {
                "checkpoint": config_dict.placeholder(str),
                "rows": 300,  # of text that the transformer sees
                "instruction": True,  # the checkpoint's, before every caption, if it has one
                "train": False,
                # Of one that trains: its sizes, and where it is new the folder of its tokenizer.
                "network": dataclasses.asdict(Gemma2Config()),
                "tokenizer": config_dict.placeholder(str),
            },
            "dtype": "bfloat16",  # of activations and the text encoder; what trains is float32
            "remat": "none",  # models/dit.py's REMAT
            # Blocks in one turn of their loop: more is faster on CPUs, and longer to compile.
            "unroll": 1,
            "mesh": {"replica": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
            "recipe": dataclasses.asdict(recipe),
            # "sqrt": learning rates are for a batch of 256 and grow with the root of the batch.
            "auto_lr": "sqrt",
            "data": {
                "source": "shapes",  # or tfds:NAME, precomputed:DIR, a folder of images
                "data_dir": config_dict.placeholder(str),  # default: WORKDIR/data
                "train_split": "train",
                "test_split": "test",
                "size": config_dict.placeholder(int),  # pixels a side; default: the network's own
                "buckets": False,  # keep aspect ratios: the published sizes around `size`
                "crop": "centre",
                "flip": False,
                "upscale": False,
                "captions": dataclasses.asdict(CaptionChoice()),
                "shapes": {"train": 20_000, "test": 1000, "seed": 0},  # records
            },
            # A run stands so many bad records of those that it reads, or ten an epoch and host.
            "loader": {"threads": 8, "prefetch": 4, "bad_fraction": 0.001},
            "evaluation": {
                "batches": 4,  # of held-out data
                # Fixed, like the seed of its noise and order, and its captions: runs are compared
                # by it.
                "batch_size": min(batch_size, 512),
                "seed": 0,
                "captions": dataclasses.asdict(CaptionChoice()),
                "sigmas": (0.1, 0.3, 0.5, 0.7, 0.9),
            },
            "images": {"prompts": (), "num_steps": 20, "guidance_scale": 4.5, "seed": 0},
            "loop": {
                "log_every": 20,
                "checkpoint_every": 500,
                "images_every": 0,
                "evaluate_every": 0,
                "max_streak": 20,
                "watchdog_seconds": 1800.0,
                "profile": False,
            },
            "keep": 3,  # checkpoints
            "keep_every": config_dict.placeholder(int),  # steps whose checkpoints stay for good
            # FLOP/s of a device, for MFU; default: known by its kind (flops.py).
            "peak_flops": config_dict.placeholder(float),
        }
    )
