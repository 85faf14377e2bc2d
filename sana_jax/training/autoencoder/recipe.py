"""The autoencoder recipe with its defaults, from which the files in configs/ start."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict, config_dict

from sana_jax import sharding
from sana_jax.data.images import MAX_PIXELS
from sana_jax.data.loader import LoaderConfig
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.runtime.checks import as_group, at_least, check_least, read_group
from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder.data import transform
from sana_jax.training.autoencoder.task import Phase
from sana_jax.training.config_types import check_types
from sana_jax.training.loop import LoopConfig
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class CachingLoaderConfig(LoaderConfig):
    """The loader of a run which keeps decoded images in memory."""

    cache_gib: float = 4.0  # at most, on each host


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The held-out images on which a phase is measured, before and after."""

    images: int = 1000
    batch_size: int = 32
    sizes: tuple[int, ...] = (256, 512)  # pixels a side

    def __post_init__(self):
        for name in "images", "batch_size":
            at_least(name, getattr(self, name), 1)


def check_figures(config: ConfigDict) -> None:
    """Raises UserError for figures of a recipe that would otherwise be refused late in a run."""
    recipe = autoencoder(DCAEConfig())
    check_types(config, recipe, but=["network", "phases"])
    for name, phase in config.phases.items():
        check_types(phase, recipe.phases.low_resolution, key=f"config.phases.{name}")
    check_least(config, {"data.shapes.test": 1})
    read_group(LoopConfig, {"steps": 0} | config.loop.to_dict(), "config.loop")
    read_group(CachingLoaderConfig, config.loader.to_dict(), "config.loader")
    read_group(EvaluationConfig, config.evaluation.to_dict(), "config.evaluation")


def _phase(
    learning_rate: float, weight_decay: float, betas: tuple[float, float], **fields: Any
) -> Phase:
    optimizer = OptimizerConfig(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        beta1=betas[0],
        beta2=betas[1],
        clip_norm=1.0,
    )
    return Phase(autoencoder=optimizer, discriminator=optimizer, **fields)


PHASES = {
    "low_resolution": _phase(
        *(6.4e-5, 0.1, (0.9, 0.999)),
        steps=200_000,
        image_size=256,
        batch_size=256,
        trainable=(".*",),
    ),
    "latent_adaptation": _phase(
        *(1.6e-5, 0.001, (0.9, 0.999)),
        steps=20_000,
        image_size=1024,
        batch_size=32,
        trainable=("encoder/conv_out/.*", "decoder/conv_in/.*"),
    ),
    "local_refinement": _phase(
        *(5.4e-5, 0.0, (0.5, 0.9)),
        steps=100_000,
        image_size=256,
        batch_size=256,
        trainable=("decoder/conv_out/.*",),
        adversarial=0.5,
    ),
}


def autoencoder(network: DCAEConfig) -> ConfigDict:
    """Returns DC-AE's recipe of three phases (arXiv 2410.10733, section 3.3 and appendix A).

    The learning rates, decays and betas are the paper's. So are the layers that train, as far as it
    names them: we take its "head layers" to be the single convolutions around the latent and before
    the pixels. Steps, batches, loss weights and the moving average are unpublished, and ours.
    """
    return ConfigDict(
        {
            "seed": 0,
            "network": as_group(network, "quantised"),  # weights in int8 do not train
            # The autoencoder that the first phase starts from: "shapes" or a checkpoint's folder.
            "start": config_dict.placeholder(str),
            "discriminator": {"width": 64, "layers": 3, "norm": "group_norm"},
            # A loss of autoencoder/perceptual.py, and the file of its weights where it has any.
            "perceptual": {"name": "lpips_vgg", "weights": config_dict.placeholder(str)},
            "dtype": "bfloat16",  # of activations; parameters are float32
            "remat": False,  # compute the blocks' activations again in the backward pass
            "mesh": {"replica": 1, "fsdp": -1},
            "data": {
                "source": "shapes",  # or tfds:NAME, or a folder of images
                "data_dir": config_dict.placeholder(str),  # default: WORKDIR/data
                "train_split": "train",
                "test_split": "test",
                "max_pixels": MAX_PIXELS,  # of an image; larger ones are left out
                # Of the built-in data set: (pixels, training records) for each size in use.
                "shapes": {"train": ((128, 20_000), (256, 4_000)), "test": 1000, "seed": 0},
            },
            "loader": as_group(CachingLoaderConfig()),
            # The phases to run, in order; each starts from the moving average of the one before.
            "run": tuple(PHASES),
            "phases": {name: as_group(phase) for name, phase in PHASES.items()},
            "evaluation": as_group(EvaluationConfig()),
            "scale_images": 2048,  # on which the latents' scaling factor is measured
            # Without `steps`, which each phase has.
            "loop": as_group(LoopConfig(0, images_every=1000), "steps", "evaluate_every"),
            "keep": 3,  # checkpoints
        }
    )


def read_phase(fields: dict[str, Any], key: str = "config.phases.*") -> Phase:
    """Reads a phase from its part of the config. Raises UserError, with `key` before the name."""
    return read_group(Phase, fields, key)


def check_phase(name: str, phase: Phase, network: DCAEConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError for sizes that do not divide, and for unknown or unfit options."""
    key = f"config.phases.{name}"
    if phase.image_size % network.factor:
        raise UserError(
            f"{key}.image_size={phase.image_size}: it is a multiple of {network.factor}"
        )
    divisor = sharding.batch_divisor(mesh) * phase.microbatches
    if phase.batch_size < 1 or phase.batch_size % divisor:
        raise UserError(
            f"{key}.batch_size={phase.batch_size}: it is a multiple of {divisor}, the devices that"
            " split it times the microbatches"
        )
    try:
        transform(phase)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    for optimizer in ("autoencoder", "discriminator")[: 2 if phase.adversarial else 1]:
        try:
            make_schedule(getattr(phase, optimizer), phase.steps)
        except UserError as error:
            raise UserError(f"{key}.{optimizer}.{error}") from None
