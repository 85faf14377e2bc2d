"""The text-to-image recipe with its defaults, from which the files in configs/ start."""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict, FieldReference, config_dict

from sana_jax import sharding
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import MAX_PIXELS
from sana_jax.data.loader import LoaderConfig
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import PRESETS, SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.runtime import checks
from sana_jax.runtime.checks import as_group, read_group
from sana_jax.runtime.errors import UserError
from sana_jax.training.loop import LoopConfig
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_schedule, sqrt_scaled
from sana_jax.training.text_to_image.task import Recipe

AUTO_LR_BATCH = 256  # the batch that learning rates are stated for, if config.auto_lr is "sqrt"

# The validation prompts of the full-size recipes.
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


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The batches and noise levels of the held-out error, by which runs are compared."""

    batch_size: int
    batches: int = 4
    seed: int = 0  # of the batches' noise and order
    captions: CaptionChoice = CaptionChoice()
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # noise levels

    def __post_init__(self):
        checks.integer("batches", self.batches, 1, 2**31)
        checks.integer("seed", self.seed, 0, checks.MAX_SEED)
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            raise UserError(f"sigmas={self.sigmas}: give some in (0, 1]")


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """The validation images that a run draws as it trains."""

    prompts: tuple[str, ...] = ()
    num_steps: int = 20
    guidance_scale: float = 4.5
    seed: int = 0

    def __post_init__(self):
        checks.integer("num_steps", self.num_steps, 1, checks.MAX_STEPS)
        checks.integer("seed", self.seed, 0, checks.MAX_SEED)
        checks.number("guidance_scale", self.guidance_scale, -1e6, 1e6)


@dataclasses.dataclass(frozen=True)
class PriorConfig:
    """Prior preservation (data/prior.py): half of each batch are pictures that `start` drew."""

    prompt: str | None = None  # of the class, such as "a photo of a dog"; None: no such pictures
    prompts: str | None = None  # or a file of prompts, as of sample --prompts, which take turns
    # That are drawn before the training starts; None: 100, or one of each prompt if these are more.
    images: int | None = None
    weight: float = 1.0  # of their error beside that of the data

    def __post_init__(self):
        if self.prompts is not None and self.prompt is not None:
            raise UserError("prompt and prompts are given: leave one of them out")
        given = (self.prompt, self.images, self.weight) != (None, None, PriorConfig.weight)
        if self.prompts is None and given and not (self.prompt or "").strip():
            raise UserError("prompt is missing: give the class, such as 'a photo of a dog'")
        if self.images is not None:
            checks.within("images", self.images, 1, 10**6)
        checks.positive("weight", self.weight)


def has_prior(config: ConfigDict) -> bool:
    """Returns True if half of each batch is of a class."""
    return config.prior.prompt is not None or config.prior.prompts is not None


def check_figures(config: ConfigDict) -> None:
    """Raises UserError for figures of a recipe that would otherwise be refused late in a run."""
    checks.check_least(config, {"keep_every": 1})
    read_group(LoaderConfig, config.loader.to_dict(), "config.loader")
    read_group(PriorConfig, config.prior.to_dict(), "config.prior")
    if has_prior(config) and not config.start:
        raise UserError("config.prior: config.start draws its pictures; name a checkpoint")
    if config.loop.evaluate_every:
        read_group(EvaluationConfig, config.evaluation.to_dict(), "config.evaluation")
    if config.loop.images_every:
        if config.images.prompts is not None and not config.images.prompts:
            raise UserError("config.images.prompts is empty: give some, or loop.images_every=0")
        read_group(ImagesConfig, config.images.to_dict(), "config.images")


def text_to_image(network: SanaConfig, steps: int, batch_size: int) -> ConfigDict:
    """Returns SANA's recipe for the transformer (arXiv 2410.10629 and its published configs).

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
            # SanaConfig, and the implementation that its module uses (kernels/dispatch.py).
            "network": as_group(network) | {"implementation": "auto"} | _optional(network),
            # A checkpoint whose transformer is trained further; none: it starts from nothing.
            "start": config_dict.placeholder(str),
            "autoencoder": config_dict.placeholder(str),  # a checkpoint that has one
            "text_encoder": {
                "checkpoint": config_dict.placeholder(str),
                "rows": 300,  # of text that the transformer sees
                "instruction": True,  # put the checkpoint's, if it has one, before every caption
                "train": False,
                # If it trains: its sizes, and the folder of its tokenizer where it is new.
                "network": as_group(Gemma2Config()),
                "tokenizer": config_dict.placeholder(str),
            },
            # With a rank, a LoRA is all that trains: of the transformer, whose weights are those of
            # `start`, and of the text encoder for targets that begin with text_encoder/.
            # WORKDIR/model then holds pytorch_lora_weights.safetensors alone.
            "lora": as_group(LoraConfig()) | {"alpha": config_dict.placeholder(float)},
            # Of activations and of frozen weights; weights that train are float32.
            "dtype": "bfloat16",
            "remat": "none",  # models/remat.py's REMAT
            # Blocks in one iteration of their loop: more run faster on CPUs, but compile longer.
            "unroll": 1,
            "mesh": {"replica": 1, "fsdp": -1, "sequence": 1, "tensor": 1},
            "recipe": as_group(recipe),
            # "sqrt": the learning rate is for a batch of 256, and grows with the root of the batch.
            "auto_lr": "sqrt",
            "data": {
                "source": "shapes",  # or any other of data/README.md
                "data_dir": config_dict.placeholder(str),  # default: WORKDIR/data
                "train_split": "train",
                "test_split": "test",
                "size": config_dict.placeholder(int),  # pixels a side; default: the network's own
                "buckets": False,  # keep aspect ratios, by the published sizes around `size`
                "crop": "centre",
                "flip": False,
                "upscale": False,
                "max_pixels": MAX_PIXELS,  # of an image; larger ones are left out
                "repeat": False,  # images, to fill batches with fewer of them
                "check_first": 0,  # images, of which none may be bad
                # Of images that have none of their own, or a template of all captions
                # (data/caption_template.py).
                "caption": config_dict.placeholder(str),
                "captions": as_group(CaptionChoice()),
                "shapes": {"train": 20_000, "test": 1000, "seed": 0},  # records
            },
            "prior": as_group(PriorConfig())
            | {name: config_dict.placeholder(str) for name in ("prompt", "prompts")}
            | {"images": config_dict.placeholder(int)},
            "loader": as_group(LoaderConfig()),
            "evaluation": as_group(EvaluationConfig(batch_size=min(batch_size, 512))),
            "images": as_group(ImagesConfig()),
            "loop": as_group(LoopConfig(steps, log_every=20, checkpoint_every=500), "steps"),
            "keep": 3,  # checkpoints
            "keep_every": config_dict.placeholder(int),  # its multiples are kept for good
            # FLOP/s of a device, for MFU; default: by the kind of device (models/flops.py).
            "peak_flops": config_dict.placeholder(float),
        }
    )


def _optional(network: SanaConfig) -> dict[str, FieldReference]:
    """Returns fields in a form of which a flag can take the value away, by =None."""
    fields = {"interpolation_scale": network.interpolation_scale}
    return {k: FieldReference(x, object) for k, x in fields.items() if x is not None}


def full_size(
    preset: str,
    steps: int,
    batch_size: int,
    encoder_microbatches: int = 1,
    make: Callable[[SanaConfig, int, int], ConfigDict] = text_to_image,
) -> ConfigDict:
    """Returns the recipe of a published network, for the 256 chips of a v5e 16x16 slice.

    `preset` is one of models/dit.py's. Four copies of the state are each sharded over 64 chips,
    blocks are computed again for their gradients, and pictures keep their aspect ratios.
    """
    config = make(PRESETS[preset], steps, batch_size)
    config.mesh.update(replica=4, fsdp=64)
    config.remat = "full"
    config.data.buckets = True
    config.recipe.encoder_microbatches = encoder_microbatches
    config.evaluation.batch_size = 256 * encoder_microbatches  # as the training's, it splits
    config.loop.images_every = 500
    if make is text_to_image:  # others have no held-out error
        config.loop.evaluate_every = 500
    config.images.prompts = PROMPTS
    return config


def read_recipe(config: ConfigDict) -> Recipe:
    """Returns config.recipe, its learning rate scaled by config.auto_lr. Raises UserError."""
    recipe = read_group(Recipe, config.recipe.to_dict(), "config.recipe")
    optimizer = recipe.optimizer
    if config.auto_lr not in ("none", "sqrt"):
        raise UserError(f"config.auto_lr={config.auto_lr!r}: give none or sqrt")
    try:
        make_schedule(optimizer, recipe.steps)
    except UserError as error:
        raise UserError(f"config.recipe.optimizer.{error}") from None
    if config.auto_lr == "sqrt":
        rate = sqrt_scaled(optimizer.learning_rate, recipe.batch_size, AUTO_LR_BATCH)
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    return dataclasses.replace(recipe, optimizer=optimizer)


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if a batch does not split over the devices and into its parts."""
    recipe = config.recipe
    if has_prior(config) and recipe.batch_size % 2:
        raise UserError(
            f"config.recipe.batch_size={recipe.batch_size}: half of a batch is of config.prior:"
            " give an even number"
        )
    divisor = sharding.batch_divisor(mesh) * recipe.microbatches * recipe.encoder_microbatches
    for key in ("recipe", "evaluation")[: 2 if config.loop.evaluate_every else 1]:
        size = config[key].batch_size
        if size < 1 or size % divisor:
            raise UserError(
                f"config.{key}.batch_size={size}: it is a multiple of {divisor}, the devices that"
                " split it times the microbatches and the encoder's"
            )
